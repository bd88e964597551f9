"""What decoding and inference cost by themselves: processor time per image on one thread, nothing beside it.

    python -m bench.costs --store STORE

Prints a `Costs` record as JSON. Run as a process of its own, since thread counts are set for whole processes.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from bench.images import jpegs
from bench.ours import Ours
from bench.peers.common import BATCH, classify, crop, make_model, prepare
from bench.results import Costs

IMAGES = 16
_REPEATS = 5


def costs(store: Path) -> Costs:
    """Of our way, with the one model of `store`, and of the eager peers' way."""
    encoded = jpegs(IMAGES)
    ours = Ours(store, instances=1)
    torch.set_num_threads(1)
    model = make_model()
    images = [ours.decode(image) for image in encoded[: ours.batch]]
    batch = torch.stack([prepare(image) for image in encoded[:BATCH]])
    return Costs(
        precision=ours.precision,
        decode_ms=_each(ours.decode, encoded),
        infer_ms=_each(lambda _: ours.infer(0, images), range(IMAGES)) / len(images),
        peer_decode_ms=_each(prepare, encoded),
        peer_infer_ms=_each(lambda _: classify(model, batch), range(2)) / BATCH,
        peer_graph_decode_ms=_each(crop, encoded),
    )


def _each(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Processor milliseconds of a call: the median of several turns over all `items`, after one to warm up."""

    def turn() -> float:
        start = process_time()
        for item in items:
            work(item)
        return (process_time() - start) / len(items) * 1000

    turn()
    return median(turn() for _ in range(_REPEATS))


def main() -> None:
    """Read the command line, measure, and print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, type=Path)
    print(costs(parser.parse_args().store).model_dump_json())


if __name__ == "__main__":
    main()
