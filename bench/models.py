"""The table of variants in docs/performance.md: `python -m bench.models [--variants ...] [--rounds 3] [--seconds 3]`.

Each variant is served with seeded random weights of its true shapes at 224x224, as the service starts by itself: a
first time without a plan, a second time with the plan that the first one left. Both loads are what `GET /models/{id}`
says; the images per second are those of wrk with 8 clients and different JPEGs, the median of rounds that go in turn.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx
from tqdm import tqdm

from bench.bodies import bodies
from bench.load import Wrk
from bench.make_store import TAG, make_store
from bench.peers import OURS
from bench.pictures import jpegs
from bench.server import serving
from bench.tables import table
from service.architecture.variants import VARIANTS

PICTURES, CLIENTS = 32, 8


@dataclass(slots=True)
class Row:
    """What was measured of one variant: its size, seconds of the two loads, memory, and images per second by round."""

    parameters: int
    weights_bytes: int
    first_seconds: float = 0.0
    cached_seconds: float = 0.0
    memory_bytes: int = 0
    rates: list[float] = field(default_factory=list)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each variant in each round")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        rows = measure(Path(name), arguments.variants, arguments.rounds, arguments.seconds)
    print(report(rows))


def measure(folder: Path, variants: Sequence[str], rounds: int, seconds: int) -> dict[str, Row]:
    """A row for each of `variants`."""
    rows: dict[str, Row] = {}
    for variant in variants:
        card = make_store(folder / variant / "store", variant)
        rows[variant] = Row(card.parameters, card.weights.bytes)
    wrk = Wrk(folder / "bodies", bodies(jpegs(PICTURES), OURS.form))
    for turn in tqdm([(i, variant) for i in range(rounds) for variant in variants]):
        _visit(folder / turn[1], turn[1], rows[turn[1]], wrk, seconds)
    return rows


def report(rows: dict[str, Row]) -> str:
    """A Markdown table."""
    head = ("variant", "parameters", "weights", "first load", "load from the cache", "memory", "images/s, 8 clients")
    return table(head, ((f"`{variant}`", *_cells(row)) for variant, row in rows.items()))


def _visit(folder: Path, variant: str, row: Row, wrk: Wrk, seconds: int) -> None:
    """Start the service, twice in the first round, and drive it."""
    settings = {"PVT_DEFAULT_MODEL": f"{variant}.{TAG}", "PVT_TIMEOUT_MS": "120000"}
    with ExitStack() as stack:
        for _ in range(1 if row.rates else 2):
            stack.close()
            server = stack.enter_context(serving(OURS, folder, folder / "store", settings))
            server.wait(bodies(jpegs(1), OURS.form)[0])
            info = httpx.get(f"{server.url.removesuffix(OURS.path)}/models/{variant}", timeout=60).json()
            if info["plan_cached"]:
                row.cached_seconds = info["load_seconds"]
            else:
                row.first_seconds = info["load_seconds"]
            row.memory_bytes = info["memory_bytes"]
        row.rates.append(wrk.run(server.url, CLIENTS, seconds).images_per_second)


def _cells(row: Row) -> tuple[str, ...]:
    spread = f"{median(row.rates):.3g} ({min(row.rates):.3g} to {max(row.rates):.3g})"
    return (
        f"{row.parameters:,}",
        f"{row.weights_bytes / 1e6:.0f} MB",
        f"{row.first_seconds:.1f} s",
        f"{row.cached_seconds:.2f} s",
        f"{row.memory_bytes / 1e6:.0f} MB",
        spread,
    )


if __name__ == "__main__":
    main()
