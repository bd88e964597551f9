"""What clients get of a server that has more to do than it can: `python -m bench.overload [--rounds 3] [--seconds 4]`.

With the embedded model, images of 64x64 and `timeout_ms=200`: answers in time of 140, 250 and 400 connections, in
turn. Then the latency of one connection from another address, alone and beside 200 connections. Last, with pvt_v2_b0 at
224, JPEGs of 640x427 and `timeout_ms=1000`: answers in time at twice the measured capacity, open loop. wrk drives all
but the last; 127.0.0.2 must be an address of this machine, as it is on Linux.
"""

import argparse
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread
from time import perf_counter, sleep
from urllib.parse import urlsplit

from bench.bodies import Body, bodies
from bench.images import jpegs
from bench.load import Wrk
from bench.make_store import TAG, make_store
from bench.openloop import open_loop, percentile
from bench.peers import OURS
from bench.server import ROOT, Server, serving

CONNECTIONS = 140, 250, 400
CROWD = 200  # connections of one client
POLITE = "127.0.0.2"
VARIANT, CLIENTS = "pvt_v2_b0", 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    arguments = parser.parse_args()
    digit = Body("image/png", (ROOT / "docs" / "digits" / "seven.png").read_bytes())
    with TemporaryDirectory() as name:
        folder = Path(name)
        wrk = Wrk(folder / "digit", [digit])
        with serving(OURS, folder, ROOT / "model_store") as server:
            server.wait(digit)
            in_time(server, wrk, arguments.rounds, arguments.seconds)
            beside_a_crowd(server, wrk, digit, arguments.rounds, arguments.seconds)
        make_store(store := folder / "store", VARIANT)
        with serving(OURS, folder, store, {"PVT_DEFAULT_MODEL": f"{VARIANT}.{TAG}"}) as server:
            twice_the_capacity(server, folder, arguments.rounds, 2 * arguments.seconds)


def in_time(server: Server, wrk: Wrk, rounds: int, seconds: int) -> None:
    """Answers a second within 200 ms, by connections."""

    def rate(connections: int) -> float:
        run = wrk.run(f"{server.url}?timeout_ms=200", connections, seconds)
        return run.images_per_second * (1 - run.failed / run.requests)

    rates = _in_turn({count: lambda count=count: rate(count) for count in CONNECTIONS}, rounds)  # type: ignore[misc]
    for count, each in rates.items():
        print(f"{count} connections: {each:.0f} answers/s in time, {each / rates[CONNECTIONS[0]]:.2f} of the first")


def beside_a_crowd(server: Server, wrk: Wrk, body: Body, rounds: int, seconds: int) -> None:
    """Latency of one connection of a client, alone and beside many of another."""
    latencies: dict[str, list[float]] = {"alone": [], f"beside {CROWD}": []}
    for _ in range(rounds):
        server.settle(body)
        latencies["alone"] += _latencies(server.url, body, seconds)
        crowd = Thread(target=wrk.run, args=(server.url, CROWD, seconds + 2))
        crowd.start()
        sleep(1)
        latencies[f"beside {CROWD}"] += _latencies(server.url, body, seconds)
        crowd.join()
    for name, each in latencies.items():
        print(f"one connection {name}: p50 {percentile(each, 0.5):.1f}, p99 {percentile(each, 0.99):.1f} ms")


def _latencies(url: str, body: Body, seconds: float) -> list[float]:
    """Milliseconds of each answer of one connection from POLITE."""
    parts, found, end = urlsplit(url), list[float](), perf_counter() + seconds
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=60, source_address=(POLITE, 0))
    while (start := perf_counter()) < end:
        connection.request("POST", parts.path, body.data, {"Content-Type": body.content_type})
        connection.getresponse().read()
        found.append((perf_counter() - start) * 1000)
    connection.close()
    return found


def twice_the_capacity(server: Server, folder: Path, rounds: int, seconds: int) -> None:
    """Answers in time at twice the rate that 8 connections reach, as a share of that rate."""
    sent = bodies(jpegs(32), "raw")
    server.wait(sent[0])
    wrk, shares = Wrk(folder / "photos", sent), []
    for seed in range(rounds):
        capacity = wrk.run(server.url, CLIENTS, seconds).images_per_second
        url = f"{server.url}?timeout_ms=1000"
        run = open_loop(url, folder / "photos", sent[0].content_type, rate=2 * capacity, seconds=seconds, seed=seed)
        shares.append(run.answered / seconds / capacity)
        server.settle(sent[0])
        print(
            f"capacity {capacity:.0f} images/s; offered {2 * capacity:.0f}: {run.answered / seconds:.0f} in time, "
            f"{run.refused / seconds:.0f} refused, generator {run.generator_cpu:.2f} of a core"
        )
    print(f"in time at twice the capacity: {median(shares):.2f} of it")


def _in_turn(ways: Mapping[int, Callable[[], float]], rounds: int) -> dict[int, float]:
    """The median of each."""
    found = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    return {name: median(each[name] for each in found) for name in ways}


if __name__ == "__main__":
    main()
