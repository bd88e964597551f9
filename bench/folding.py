"""`python -m bench.folding [VARIANT ...]`: OpenVINO graphs with folded norms beside those with layer norms, in turn.

One image at a time on one core, in each precision that the processor computes in, with fresh weights: time does not
depend on them. Prints the ratio of the medians, and of the tenths.
"""

import sys
from time import perf_counter

import numpy as np
import torch

from service.architecture.pvt_v2 import create
from service.backends.base import Batch, Graph, Layout, Precision, Served
from service.backends.cpu import OpenVinoBackend

SIDE = 224
ROUNDS, RUNS = 40, 8  # runs of one graph, then of the other


class Plain(OpenVinoBackend):
    """OpenVINO's backend without the folding."""

    fold = False


def seconds(graphs: tuple[Graph, Graph], images: Batch) -> tuple[list[float], list[float]]:
    """What runs of each graph took."""
    taken: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS):
        for graph, times in zip(graphs, taken, strict=True):
            for _ in range(RUNS):
                start = perf_counter()
                graph.run(0, images)
                times.append(perf_counter() - start)
    return taken


def graph(backend: OpenVinoBackend, variant: str, precision: Precision) -> Graph:
    """A graph of `variant` for one image."""
    torch.manual_seed(0)
    served = Served(create(variant), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).eval()
    return backend.program(served, SIDE, SIDE).graph(1, Layout(1, 1), precision)


def main(variants: list[str]) -> None:
    """See the module."""
    images = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    print("| variant | precision | layer norms, ms | folded, ms | ratio | of the tenths |\n|---|---|---|---|---|---|")
    for variant in variants or ["pvt_v2_b0", "pvt_v2_b2"]:
        for precision in OpenVinoBackend(1).precisions:
            taken = seconds(
                (graph(Plain(1), variant, precision), graph(OpenVinoBackend(1), variant, precision)), images
            )
            (plain, folded), (least, folded_least) = (np.quantile(taken, q, axis=1) * 1000 for q in (0.5, 0.1))
            print(
                f"| {variant} | {precision} | {plain:.2f} | {folded:.2f} | {folded / plain:.3f} "
                f"| {folded_least / least:.3f} |"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
