"""A soak: one server under mixed load for long, watched for what grows and for wrong answers.

    python -m bench.soak [--minutes 60] [--out docs/soak.md]

Predictions of differing images, features, explanations, bad images, clients that hang up, slow uploads, and a second
model that is loaded and unloaded, all at the same time. Resident memory, threads, descriptors and the latency of
predictions are sampled; the report says how they changed. The status is 1 where one grew beyond its bound, an answer
was wrong, or the server did not end well.
"""

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import psutil

from bench.bodies import Body
from bench.machine import machine
from bench.openloop import percentile
from bench.peers import OURS
from bench.server import ROOT, Server, serving
from bench.soak_load import MANAGEMENT_KEY, MODEL, SECOND, Load, Tally
from bench.tables import table

_HOUR = 3600.0
SAMPLE_SECONDS, LEAST_SAMPLES = 10.0, 10
_TITLES = {"rss_mb": "resident memory (MB)", "threads": "threads", "descriptors": "descriptors",
           "p50_ms": "p50 (ms)", "p99_ms": "p99 (ms)"}  # fmt: skip
# By how much the end may exceed the start: a part of it, and so much more.
BOUNDS = {"rss_mb": (0.1, 60.0), "threads": (0.0, 4.0), "descriptors": (0.0, 24.0)}


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one time, `seconds` from the start; latencies are those of predictions since the sample before."""

    seconds: float
    rss_mb: float
    threads: float
    descriptors: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Trend:
    """How one figure changed: medians of the second and of the last fifth, and the slope of a line through the rest.

    The first fifth is left out: caches fill, threads start.
    """

    start: float
    end: float
    per_hour: float


def trend(samples: Sequence[Sample], name: str) -> Trend:
    """Of the figure `name` of `samples`, of which there are at least five."""
    fifth = len(samples) // 5
    values = [float(getattr(sample, name)) for sample in samples]
    hours = [sample.seconds / 3600 for sample in samples]
    slope = float(np.polyfit(hours[fifth:], values[fifth:], 1)[0])
    return Trend(median(values[fifth : 2 * fifth]), median(values[-fifth:]), slope)


def growths(samples: Sequence[Sample]) -> list[str]:
    """What grew beyond its bound, in words."""
    found = []
    for name, (part, more) in BOUNDS.items():
        change = trend(samples, name)
        if change.end > (most := change.start * (1 + part) + more):
            found.append(f"{_TITLES[name]}: {change.start:.0f} grew to {change.end:.0f}, and {most:.0f} is allowed")
    return found


def outlooks(samples: Sequence[Sample]) -> list[str]:
    """What would grow beyond its bound in an hour at the slope of a shorter run, in words."""
    found = []
    if samples[-1].seconds < _HOUR:
        for name, (part, more) in BOUNDS.items():
            change = trend(samples, name)
            if change.per_hour > change.start * part + more:
                found.append(
                    f"At the slope of this run {_TITLES[name]} would grow by {change.per_hour:.0f} in an hour, "
                    "which is beyond its bound; the run is too short to tell whether it levels off."
                )
    return found


def report(samples: Sequence[Sample], tally: Tally, faults: Sequence[str], note: str = "") -> str:
    """The page; `note` says what else there is to know of the run."""
    trends = {name: trend(samples, name) for name in _TITLES}
    rows = [(_TITLES[name], f"{it.start:.1f}", f"{it.end:.1f}", f"{it.per_hour:+.1f}") for name, it in trends.items()]
    here = machine()
    minutes = samples[-1].seconds / 60
    loads = [(kind, tally.good[kind], tally.refused[kind]) for kind in sorted({*tally.good, *tally.refused})]
    lines = [f"- {fault}" for fault in faults] or ["Nothing grew beyond its bound, and no answer was wrong."]
    verdict = "\n".join([*lines, *chain.from_iterable(("", each) for each in outlooks(samples))])
    return f"""# Soak

You want to know whether the service can run for long. `python -m bench.soak` puts one server under mixed load for an
hour, which is the default of `--minutes`, and writes this page. **This run took {minutes:.0f} minutes**, on
{here["cores"]} cores of {here["processor"]}, {here["memory"]}, {here["system"]}.{" " * bool(note)}{note}

{verdict}

The clock starts when everything ran once, and the second model was loaded and unloaded twice. Start is the median of
the second fifth of the samples and end that of the last; the slope is that of a line through all but the first fifth.

{table(("", "start", "end", "slope per hour"), rows)}

The command ends with 1 where the end exceeds the start by more than {_bounds()},
where an answer is wrong, or where the server does not end with 0 on SIGTERM. Latencies are those of `POST /predict`
beside everything else, and have no bound: they depend on what else the machine does.

{table(("load", "answered as it should be", "refused with `Retry-After`"), loads)}
"""


def _bounds() -> str:
    words = [f"{part:.0%} and {more:g} of {_TITLES[name]}" if part else f"{more:g} {_TITLES[name]}"
             for name, (part, more) in BOUNDS.items()]  # fmt: skip
    return ", ".join(words[:-1]) + f" or {words[-1]}"


def main() -> None:
    """Run, report, and end with 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "soak.md")
    parser.add_argument("--note", default="", help="what else there is to know of the run, for the report")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        samples, tally, status = soak(Path(name), arguments.minutes * 60)
    faults = [*growths(samples), *tally.wrong]
    if status:
        faults.append(f"the server ended with {status}")
    page = report(samples, tally, faults, arguments.note)
    arguments.out.write_text(page)
    print(page)
    sys.exit(bool(faults))


def soak(folder: Path, seconds: float) -> tuple[list[Sample], Tally, int]:
    """A server in `folder` under load for `seconds`: samples of it, its answers, and the status with which it ended."""
    store = two_models(folder / "store")
    settings = {"PVT_MANAGEMENT_KEYS": MANAGEMENT_KEY, "PVT_DEFAULT_MODEL": MODEL}
    tally = Tally()
    with serving(OURS, folder, store, settings) as server:
        server.wait(Body("image/png", (ROOT / "docs" / "digits" / "seven.png").read_bytes()))
        samples = asyncio.run(_watched(server, tally, seconds))
        server.stop()
    return samples, tally, server.process.returncode


def two_models(folder: Path) -> Path:
    """The embedded model under two names."""
    for name in (MODEL, SECOND):
        version = folder / name / "1"
        shutil.copytree(ROOT / "model_store" / MODEL / "1", version)
        card = json.loads((version / "card.json").read_text())
        (version / "card.json").write_text(json.dumps({**card, "id": name}))
    return folder


async def _watched(server: Server, tally: Tally, seconds: float) -> list[Sample]:
    pause, samples = min(SAMPLE_SECONDS, seconds / LEAST_SAMPLES), list[Sample]()
    async with Load(server.url.removesuffix(OURS.path), tally) as load:
        await load.warm()
        start = perf_counter()
        while perf_counter() - start < seconds:
            await asyncio.sleep(pause)
            if server.process.poll() is not None:
                tally.wrong.append("the server ended")
                break
            samples.append(await asyncio.to_thread(_sample, server, perf_counter() - start, tally))
    return samples


def _sample(server: Server, seconds: float, tally: Tally) -> Sample:
    root = psutil.Process(server.process.pid)
    tree = [root, *root.children(recursive=True)]
    latencies, tally.latencies_ms = tally.latencies_ms, []
    return Sample(
        seconds=seconds,
        rss_mb=server.resident_bytes() / 1e6,
        threads=sum(each.num_threads() for each in tree),
        descriptors=sum(each.num_fds() for each in tree),
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
    )


if __name__ == "__main__":
    main()
