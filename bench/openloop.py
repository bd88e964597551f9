"""Open-loop load: requests leave at times fixed beforehand, whether or not earlier ones were answered.

    python -m bench.openloop --url URL --bodies FOLDER --content-type TYPE --rate 50 --seconds 5 [--uniform] [--seed 0]
        [--suffix .body]

Latency counts from the time at which a request was to be sent, so a server that stalls is charged for every request
that the stall delayed ("coordinated omission" can't occur). It runs as a process of its own, of one thread, and prints
an `Open` record as JSON.
"""

import argparse
import asyncio
import gc
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import process_time

import numpy as np

from bench.bodies import Body
from bench.generator import Call, drive
from bench.results import Open

_OK = 200


def arrivals(rate: float, seconds: float, *, seed: int = 0, uniform: bool = False) -> list[float]:
    """Send times in seconds from the start, ascending and below `seconds`: `rate` a second, evenly or as Poisson's."""
    if uniform:
        return [i / rate for i in range(round(rate * seconds))]
    random = np.random.default_rng(seed)
    times: list[float] = []
    now = float(random.exponential(1 / rate))
    while now < seconds:
        times.append(now)
        now += float(random.exponential(1 / rate))
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of `values` do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0


def summary(calls: Sequence[Call], offered: float, now: float, cpu_share: float) -> Open:
    """What came of `calls` up to `now`; `cpu_share` is the generator's, of a core."""
    good = [call.finished - call.intended for call in calls if call.finished is not None and call.status == _OK]
    unanswered = [now - call.intended for call in calls if call.finished is None]
    over = [call for call in calls if call.finished is not None and call.status != _OK]
    return Open(
        offered=offered,
        sent=len(calls),
        answered=len(good),
        refused=sum(call.status != 0 for call in over),
        broken=sum(call.status == 0 for call in over),
        unanswered=len(unanswered),
        p50_ms=percentile(good + unanswered, 0.5) * 1000,
        p99_ms=percentile(good + unanswered, 0.99) * 1000,
        lag_ms=percentile([call.lag for call in calls], 0.99) * 1000,
        generator_cpu=cpu_share,
    )


async def _main(given: argparse.Namespace) -> Open:
    bodies = [Body(given.content_type, path.read_bytes()) for path in sorted(given.bodies.glob(f"*{given.suffix}"))]
    if not bodies:
        raise SystemExit(f"{given.bodies} has no file that ends in {given.suffix}; name another --suffix")
    times = arrivals(given.rate, given.seconds, seed=given.seed, uniform=given.uniform)
    loop = asyncio.get_running_loop()
    gc.disable()
    start, cpu = loop.time() + 0.1, process_time()
    calls = await drive(given.url, bodies, times, start)
    now = loop.time()
    return summary(calls, given.rate, now, (process_time() - cpu) / (now - start))


def open_loop(url: str, folder: Path, content_type: str, *, rate: float, seconds: float, seed: int) -> Open:
    """Run the generator as a process of its own over the `*.body` files of `folder`."""
    command = [sys.executable, "-m", "bench.openloop", "--url", url, "--bodies", str(folder)]
    command += ["--content-type", content_type, "--rate", str(rate), "--seconds", str(seconds), "--seed", str(seed)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return Open.model_validate_json(run.stdout)


def arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """What `command_line`, by default that of this process, asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--bodies", required=True, type=Path, help="folder with a file for each request body")
    parser.add_argument("--suffix", default=".body", help="of these files; .body by default")
    parser.add_argument("--content-type", required=True)
    parser.add_argument("--rate", required=True, type=float, help="requests a second")
    parser.add_argument("--seconds", required=True, type=float)
    parser.add_argument("--seed", type=int, default=0, help="of the Poisson arrivals")
    parser.add_argument("--uniform", action="store_true", help="evenly spaced arrivals instead of Poisson's")
    return parser.parse_args(command_line)


def main() -> None:
    """Read the command line, send, and print the record."""
    print(asyncio.run(_main(arguments())).model_dump_json())


if __name__ == "__main__":
    main()
