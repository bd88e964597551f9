"""How far a reduced precision is from float32, by batch size: the table of decision 36 in docs/decisions.

    python -m bench.precision [--precision bfloat16] [--backend openvino] [--variants pvt_v2_b0 ...] [--images 16]
    python -m bench.precision --headless    the embeddings of models without a head: decision 75

Each variant has seeded random weights and a head of 1000 classes, scaled to logits of the size of trained ones, and
answers synthetic images of 224x224; the embedded model answers its card's reference images. `ONEDNN_MAX_CPU_ISA`
chooses among the processor's instruction sets.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import nn

from bench.machine import machine
from bench.tables import table
from service.architecture.pvt_v2 import create
from service.architecture.variants import VARIANTS
from service.backends.base import Backend, Layout, Precision, Served, build, plain_logits
from service.backends.cpu import OpenVinoBackend, TorchBackend
from service.execution.reference import Deviation, Reference, reference_of, synthetic_images, worst
from service.store.store import Store

SIZES = (1, 2, 4, 8)
EMBEDDED = "pvt_v2_b0.digits"
SIDE, CLASSES = 224, 1000
TRAINED_LOGITS = 1.5  # standard deviation; what is measured does not depend on it
STORE = Path(__file__).parent.parent / "model_store"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=get_args(Precision), default="bfloat16")
    parser.add_argument("--backend", choices=("openvino", "torch"), default="openvino")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, EMBEDDED], default=[*VARIANTS, EMBEDDED])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--headless", action="store_true")
    arguments = parser.parse_args()
    here = machine()
    print(f"{here['processor']}, {here['instructions']}, at most {os.environ.get('ONEDNN_MAX_CPU_ISA', 'all of them')}")
    backend: Backend = (OpenVinoBackend if arguments.backend == "openvino" else TorchBackend)(1)
    models = (_model(name, arguments.images, headless=arguments.headless) for name in arguments.variants)
    rows = (
        _row(name, deviations(backend, *model, arguments.precision, arguments.sizes))
        for name, model in zip(arguments.variants, models, strict=True)
    )
    print(f"{arguments.backend}, {arguments.precision}: largest differences as shares of the spread, by batch size")
    print(table(("model", *arguments.sizes, "least cosine", "other top classes", "apart"), rows))


def _model(name: str, images: int, *, headless: bool) -> tuple[Served, Reference]:
    if name == EMBEDDED:
        stored = Store(STORE).find(name)
        card = stored.require_card()
        reference = reference_of(card, stored.folder)
        assert reference  # noqa: S101  the project's own card
        module, samples = build(card, stored.folder), reference.images
    else:
        torch.manual_seed(0)
        module = Served(create(name, num_classes=CLASSES), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()
        samples = synthetic_images(SIDE, SIDE, images)
        head = module.model.head
        assert isinstance(head, nn.Linear)  # noqa: S101  it has classes
        with torch.no_grad():
            head.weight.mul_(TRAINED_LOGITS / float(plain_logits(module, samples[:1]).std()))
    if headless:
        module.model.head = nn.Identity()
    logits = np.concatenate([plain_logits(module, samples[i : i + 1]) for i in range(len(samples))])
    return module, Reference(samples, logits, embeddings=headless)


def deviations(
    backend: Backend, module: Served, reference: Reference, precision: Precision, sizes: Sequence[int]
) -> list[Deviation]:
    """How far `module` is off in batches of each of `sizes`; all images are tried.

    Raises:
        ValueError: the machine does not compute in `precision`.
    """
    images = reference.images
    program = backend.program(module, *images.shape[1:3])
    found = []
    for size in sizes:
        graph = program.graph(size, Layout(1, 1), precision)
        if graph.precision != precision:
            raise ValueError(f"{backend.name} computes in {graph.precision} here, not in {precision}")
        numbers = [i % len(images) for i in range(-(-len(images) // size) * size)]
        batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        logits = np.concatenate([graph.run(0, images[batch])[0] for batch in batches])
        found.append(reference.deviation(logits, numbers))
    return found


def _row(name: str, found: Sequence[Deviation]) -> tuple[str, ...]:
    all_ = worst(found)
    swaps = f"{all_.changed} of {all_.images}"
    shares = (f"{each.share:.4f}" for each in found)
    return f"`{name}`", *shares, f"{all_.cosine:.6f}", swaps, f"{all_.swap:.4f}" if all_.changed else ""


if __name__ == "__main__":
    main()
