"""Processor time per request that is neither decoding nor inference.

    python -m bench.http_overhead [--rounds 5] [--seconds 2] [--clients 8] [--tree DIR ...] [--traces]

First the real server, but with `decode` and `Executable.run` answering at once: what is left is HTTP, admission,
queues, hand-overs to threads and back, log and metrics. wrk drives it with real JPEGs of 640x427, each form of body in
turn. Then ("loop") the server as it is: the processor time of its event loop's thread per image. Decoding and inference
run on threads of their own, so it is all HTTP and queues, but without the other ends of the hand-overs.

Each `--tree` is a checkout to measure; rounds go in turn over all of them, so that drift hits all alike, and each is
compared with the first. `--traces` adds the last one with every request traced, and with one in a hundred: spans go to
a collector in this process, which drops them and whose time does not count.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread

import httpx
import psutil

from bench.bodies import Form, bodies
from bench.images import jpegs
from bench.load import Wrk
from bench.make_store import TAG, make_store

ROOT = Path(__file__).parent.parent
VARIANT = "pvt_v2_b0"
IMAGES = 32
LOAD_SECONDS = 300  # on a busy machine
# What is measured of each tree, and with `--traces` of the last one too: what it is called, and its variables.
PLAIN: Mapping[str, str] = {}
TRACES: Mapping[str, Mapping[str, str]] = {
    "traced": {"OTEL_TRACES_SAMPLER": "always_on"},
    "one in 100 traced": {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"},
}
FORMS: tuple[Form, ...] = ("multipart", "raw")
# What runs in the measured checkout: its own server.
WHOLE = """
import runpy
runpy.run_module("app", run_name="__main__", alter_sys=True)
"""
# The same with the two things that are not to be measured replaced.
TRIVIAL = f"""
import numpy as np
import service.pipeline
from service.images.decoding import Decoded
from service.execution.executable import Executable
from service.pipeline import Outputs

decoded = Decoded(np.zeros((224, 224, 3), np.uint8), 640, 427)
output = Outputs(np.linspace(0, 5, 1000, dtype=np.float32), np.zeros(256, np.float32))
service.pipeline.decode = lambda *_, **__: decoded
Executable.run = lambda self, instance, images, **_: [output] * len(images)
{WHOLE}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and its process."""

    url: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Processor time used so far, by the user's code and in the kernel, child processes included."""
        family = [self.process, *self.process.children(recursive=True)]
        return float(sum(sum(each.cpu_times()[:2]) for each in family))

    def loop_seconds(self) -> float:
        """Processor time of the main thread so far."""
        return sum(each.user_time + each.system_time for each in self.process.threads() if each.id == self.process.pid)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of each form of body in each round")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tree", type=Path, action="append", help="a checkout to measure; this one without")
    parser.add_argument("--traces", action="store_true", help="measure the last tree with traces too")
    arguments = parser.parse_args()
    trees = [(str(tree), tree, PLAIN) for tree in arguments.tree or [ROOT]]
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        if arguments.traces:
            where = {"OTEL_EXPORTER_OTLP_ENDPOINT": stack.enter_context(collector())}
            trees += [(what, trees[-1][1], {**where, **variables}) for what, variables in TRACES.items()]
        images = jpegs(IMAGES)
        loads = {form: Wrk(folder / form, bodies(images, form)) for form in FORMS}
        make_store(folder / "store", VARIANT)

        def started(kind: str, program: str) -> list[Server]:
            servers = (
                serving(tree, folder, f"{kind}{n}", program, variables=variables)
                for n, (_, tree, variables) in enumerate(trees)
            )
            return [stack.enter_context(server) for server in servers]

        whole, servers = started("whole", WHOLE), started("bare", TRIVIAL)
        figures: dict[str, list[list[float]]] = {form: [[] for _ in trees] for form in (*FORMS, "loop")}
        for _ in range(arguments.rounds):
            for form, wrk in loads.items():
                for runs, server in zip(figures[form], servers, strict=True):
                    runs.append(milliseconds(server.cpu_seconds, server.url, wrk, arguments))
            for runs, server in zip(figures["loop"], whole, strict=True):
                runs.append(milliseconds(server.loop_seconds, server.url, loads["multipart"], arguments))
    for what, each in figures.items():
        for (tree, *_), runs in zip(trees, each, strict=True):
            ratio = median(run / first for run, first in zip(runs, each[0], strict=True))
            print(f"{what:9} {median(runs):.3f} ms ({min(runs):.3f} to {max(runs):.3f})  x{ratio:.3f}  {tree}")


def milliseconds(used: Callable[[], float], url: str, wrk: Wrk, arguments: argparse.Namespace) -> float:
    """Processor time per request while wrk drives the server at `url`; `used` says how many seconds there were so far.

    Raises:
        RuntimeError: a request was not answered with 200.
    """
    before = used()
    load = wrk.run(f"{url}/predict", arguments.clients, arguments.seconds)
    if load.failed or not load.requests:
        raise RuntimeError(f"not every request was answered: {load}")
    return (used() - before) / load.requests * 1000


@contextmanager
def collector() -> Iterator[str]:
    """The URL of a collector that takes spans and drops them."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(HTTPStatus.OK)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing is to be said."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def serving(  # noqa: PLR0917  what starts it, in that order
    tree: Path, folder: Path, name: str, program: str, variant: str = VARIANT, variables: Mapping[str, str] = PLAIN
) -> Iterator[Server]:
    """The server of `tree`, with its model loaded; its log goes to a file."""
    log = folder / f"{name}.log"
    settings = {"PORT": "0", "MODEL_STORE": str(folder / "store"), "DEFAULT_MODEL": f"{variant}.{TAG}"}
    # A home of its own, and so a plan cache of its own: a setting for that, older checkouts would refuse.
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PVT_MAX_BATCH_SIZE": "1",
        "PVT_TIMEOUT_MS": str(LOAD_SECONDS * 1000),
        **{f"PVT_{key}": value for key, value in settings.items()},
        **variables,
    }
    with log.open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-c", program], cwd=tree, env=environment, stderr=errors)
    try:
        url = listening(process, log)
        httpx.post(f"{url}/predict", files={"image": jpegs(1)[0]}, timeout=LOAD_SECONDS).raise_for_status()
        yield Server(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


def listening(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Where the server listens, once it says so in its log."""
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if '"event":"listening"' in line and line.endswith("}"):
                return str(json.loads(line)["url"])
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")


if __name__ == "__main__":
    main()
