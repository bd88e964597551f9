"""Small stores for tests."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from service.architecture.pvt_v2 import create
from service.store.cards import ModelCard, Preprocessing
from service.store.folder import weights_file, write_model


@cache
def _weights(variant: str, classes: int) -> tuple[bytes, int]:
    """A safetensors file and the number of its parameters."""
    torch.manual_seed(0)
    model = create(variant, num_classes=classes)
    return save(dict(model.state_dict())), sum(parameter.numel() for parameter in model.parameters())


def add_model(root: Path, id_: str = "pvt_v2_b0.tiny", version: str = "1", *, classes: int = 3, side: int = 32) -> Path:
    """A model with seeded random weights; returns its version folder."""
    variant = id_.partition(".")[0]
    weights, parameters = _weights(variant, classes)
    card = ModelCard(
        id=id_,
        variant=variant,
        labels=tuple(f"label {i}" for i in range(classes)),
        preprocessing=Preprocessing(height=side, width=side),
        weights=weights_file(weights),
        parameters=parameters,
        licence="Apache-2.0",
        source="random",
    )
    return write_model(root, version, card, weights)
