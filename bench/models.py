"""Every variant served with its defaults: `python -m bench.models [--variants ...] [--rounds 3] [--seconds 3]`.

Each variant is served with seeded random weights of its true shapes at 224x224, as the service starts by itself: a
first time without a plan, a second time with the plan that the first one left. Both loads are what `GET /models/{id}`
says; the images per second are those of wrk with 8 clients and different JPEGs, the median of rounds that go in turn.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from tqdm import tqdm

from bench.bodies import bodies
from bench.images import jpegs
from bench.load import Wrk
from bench.make_store import TAG, make_store
from bench.peers import OURS
from bench.ratios import some
from bench.results import Model
from bench.server import Server, serving
from bench.tables import table
from service.architecture.variants import VARIANTS

IMAGES, CLIENTS = 32, 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each variant in each round")
    arguments = parser.parse_args()
    print(report(measure(arguments.variants, arguments.rounds, arguments.seconds)))


def measure(variants: Sequence[str], rounds: int, seconds: int) -> dict[str, Model]:
    """The figures of each of `variants`, loaded twice and then driven for `seconds` in each of `rounds`."""
    models: dict[str, Model] = {}
    with TemporaryDirectory() as name:
        wrk = Wrk(Path(name) / "bodies", bodies(jpegs(IMAGES), OURS.form))
        for turn, variant in tqdm([(i, variant) for i in range(rounds) for variant in variants]):
            folder = Path(name) / variant
            if turn == 0:
                models[variant] = _loaded(folder, variant)
            rate = _rate(folder, variant, wrk, seconds)
            models[variant] = models[variant].model_copy(update={"rates": (*models[variant].rates, rate)})
    return models


def report(models: Mapping[str, Model]) -> str:
    """A Markdown table."""
    head = ("variant", "parameters", "weights", "first load", "load from the cache", "memory", "images/s, 8 clients")
    return table(head, ((f"`{variant}`", *_cells(model)) for variant, model in models.items()))


def _loaded(folder: Path, variant: str) -> Model:
    """`variant` with seeded weights, loaded without a plan and then with the plan of the first load."""
    card = make_store(folder / "store", variant)
    first = _load_report(folder, variant)
    cached = _load_report(folder, variant)
    if first["plan_cached"] or not cached["plan_cached"]:
        raise RuntimeError(f"{variant}: the second load must restore the plan of the first, and only that one")
    return Model(
        parameters=card.parameters,
        weights_bytes=card.weights.bytes,
        first_load_seconds=first["load_seconds"],
        cached_load_seconds=cached["load_seconds"],
        memory_bytes=cached["memory_bytes"],
        rates=(),
    )


def _load_report(folder: Path, variant: str) -> dict[str, Any]:
    """What `GET /models/{id}` reports after a start with whatever plan is in `folder`."""
    with _server(folder, variant) as server:
        url = f"{server.url.removesuffix(OURS.path)}/models/{variant}"
        info: dict[str, Any] = httpx.get(url, timeout=60).json()
        return info


def _rate(folder: Path, variant: str, wrk: Wrk, seconds: int) -> float:
    with _server(folder, variant) as server:
        return wrk.run(server.url, CLIENTS, seconds).images_per_second


@contextmanager
def _server(folder: Path, variant: str) -> Iterator[Server]:
    """A server whose model is loaded."""
    settings = {"PVT_DEFAULT_MODEL": f"{variant}.{TAG}", "PVT_TIMEOUT_MS": "120000"}
    with serving(OURS, folder, folder / "store", settings) as server:
        server.wait(bodies(jpegs(1), OURS.form)[0])
        yield server


def _cells(model: Model) -> tuple[str, ...]:
    return (
        f"{model.parameters:,}",
        f"{model.weights_bytes / 1e6:.0f} MB",
        f"{model.first_load_seconds:.1f} s",
        f"{model.cached_load_seconds:.2f} s",
        "" if model.memory_bytes is None else f"{model.memory_bytes / 1e6:.0f} MB",
        str(some(model.rates)),
    )


if __name__ == "__main__":
    main()
