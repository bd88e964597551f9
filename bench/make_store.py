"""Writes a model store with one 1000-class model at 224x224, to measure with.

    python -m bench.make_store --variant pvt_v2_b0 --out /tmp/store [--seed 0] [--from CHECKPOINT]

Its weights are seeded random numbers: what a model costs does not depend on them, what it answers does.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save

from service.architecture.pvt_v2 import create
from service.architecture.variants import VARIANTS
from service.architecture.weights import load_weights
from service.store.cards import ModelCard, Preprocessing
from service.store.folder import weights_file, write_model

TAG = "bench"
CLASSES = 1000


def make_store(out: Path, variant: str, *, seed: int = 0, checkpoint: Path | None = None) -> ModelCard:
    """A store at `out` with the model `<variant>.bench`, of random weights or those of `checkpoint`.

    Raises:
        WeightsInvalid, WeightsUnavailable: the checkpoint can't be read or does not fit.
    """
    torch.manual_seed(seed)
    model = create(variant, num_classes=CLASSES)
    if checkpoint:
        load_weights(model, checkpoint)
    weights = save(dict(model.state_dict()))
    card = ModelCard(
        id=f"{variant}.{TAG}",
        variant=variant,
        labels=tuple(f"class {i}" for i in range(CLASSES)),
        preprocessing=Preprocessing(height=224, width=224, crop=0.9),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        source=checkpoint.name if checkpoint else f"random weights, seed {seed}",
        licence="Apache-2.0",
        weights=weights_file(weights),
    )
    write_model(out, "1", card, weights)
    return card


def main() -> None:
    """Read the command line and write the store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", required=True, choices=VARIANTS)
    parser.add_argument("--out", required=True, type=Path, help="folder of the store")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--from", type=Path, dest="checkpoint", help="take the weights from this checkpoint instead")
    arguments = parser.parse_args()
    card = make_store(arguments.out, arguments.variant, seed=arguments.seed, checkpoint=arguments.checkpoint)
    print(f"{arguments.out / card.id}: {card.parameters:,} parameters, {card.source}")


if __name__ == "__main__":
    main()
