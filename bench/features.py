"""What embeddings cost beside predictions, and whether large answers hold up the event loop.

    python -m bench.features [--variant pvt_v2_b0] [--rounds 5] [--seconds 3] [--clients 8]

One server with random weights at 224 and real JPEGs. wrk asks in turn for predictions and for embeddings in each form,
then for embeddings and stage maps of several images at once; all rounds go over all of them, so that drift hits all
alike. Of each: the server's processor time per image beside that of /predict in the same round, which other load on
the machine harms less than it does images a second; the mean time of an answer's encoding and of a image's
inference (`pvt_stage_seconds`); and what a `GET /health/live` every few milliseconds took meanwhile, which is what the
event loop makes everyone wait.
"""

import argparse
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter

import httpx

from bench.bodies import Body, bodies, form_of
from bench.http_overhead import ROOT, WHOLE, Server, serving
from bench.images import jpegs
from bench.load import Wrk
from bench.make_store import make_store

IMAGES = 32
PROBE_SECONDS = 0.02  # between two questions
_STAGE = re.compile(r'pvt_stage_seconds_(sum|count)\{[^}]*stage="(encode|infer)"[^}]*\} (\S+)')
JSON, NPY, NPZ = "application/json", "application/x-npy", "application/x-npz"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: `images` images a request."""

    name: str
    path: str
    accept: str
    images: int = 1


QUESTIONS = (
    Question("predict", "/predict", JSON),
    Question("embedding npy", "/features", NPY),
    Question("embedding npz", "/features", NPZ),
    Question("embedding safetensors", "/features", "application/vnd.safetensors"),
    Question("embedding JSON", "/features", JSON),
    Question("4 embeddings JSON", "/features", JSON, 4),
    Question("4 x all maps npz", "/features?stages=1,2,3,4", NPZ, 4),
    Question("4 x all maps JSON", "/features?stages=1,2,3,4", JSON, 4),
)


@dataclass(slots=True)
class Figures:
    """One number for each round; times in milliseconds."""

    ratio: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)
    infer: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="pvt_v2_b0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each question in each round")
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    figures = {question: Figures() for question in QUESTIONS}
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder / "store", arguments.variant)
        loads = {each: Wrk(folder / each.name, _bodies(each.images), each.accept) for each in QUESTIONS}
        with serving(ROOT, folder, "server", WHOLE, arguments.variant) as server:
            for question, wrk in loads.items():
                wrk.run(server.url + question.path, 1, 1)  # compiles what is asked for the first time
            for _ in range(arguments.rounds):
                for question, wrk in loads.items():
                    _measure(server, question, wrk, arguments, figures)
    _print(figures)


def _bodies(images: int) -> list[Body]:
    encoded = jpegs(IMAGES)
    return bodies(encoded, "raw") if images == 1 else [form_of(encoded[:images])]


def _measure(
    server: Server, question: Question, wrk: Wrk, arguments: argparse.Namespace, figures: dict[Question, Figures]
) -> None:
    before, used = _stages(server.url), server.cpu_seconds()
    with _probing(server.url) as waits:
        load = wrk.run(server.url + question.path, arguments.clients, arguments.seconds)
    if load.failed:
        raise RuntimeError(f"not every request was answered: {question}, {load}")
    after, used = _stages(server.url), server.cpu_seconds() - used
    mine = figures[question]
    # By inferences, since wrk's count leaves out those under way at its end.
    count = after["count", "infer"] - before.get(("count", "infer"), 0)
    mine.cpu.append(used / count * 1000)
    mine.ratio.append(mine.cpu[-1] / figures[QUESTIONS[0]].cpu[-1])
    mine.waits += waits
    for stage, times in (("encode", mine.encode), ("infer", mine.infer)):
        seconds, count = (after[what, stage] - before.get((what, stage), 0) for what in ("sum", "count"))
        if count:
            times.append(seconds / count * 1000)


def _stages(url: str) -> dict[tuple[str, str], float]:
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    return {(what, stage): float(value) for what, stage, value in _STAGE.findall(text)}


@contextmanager
def _probing(url: str) -> Iterator[Sequence[float]]:
    """Milliseconds that `GET /health/live` took, one after the other while the context lasts."""
    waits: list[float] = []
    done = threading.Event()

    def probe() -> None:
        with httpx.Client(timeout=60) as client:
            while not done.wait(PROBE_SECONDS):
                start = perf_counter()
                client.get(f"{url}/health/live").raise_for_status()
                waits.append((perf_counter() - start) * 1000)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield waits
    finally:
        done.set()
        thread.join()


def _print(figures: dict[Question, Figures]) -> None:
    print(f"{'':22} CPU ms/image, : predict        encode ms  infer ms  /health/live ms: p50 p99 max")
    for question, each in figures.items():
        percentiles = quantiles(each.waits, n=100)
        spread = f"{median(each.ratio):.3f} ({min(each.ratio):.3f} to {max(each.ratio):.3f})"
        print(
            f"{question.name:22} {median(each.cpu):6.2f} {spread:24} {median(each.encode):10.3f} "
            f"{median(each.infer):9.2f} {percentiles[49]:8.1f} {percentiles[98]:.1f} {max(each.waits):.1f}"
        )


if __name__ == "__main__":
    main()
