"""The module that every backend executes, made from a card and its weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.cards import ModelCard
from service.errors import CardInvalid
from service.outputs import Floats
from service.pvt_v2 import PVT_V2, create
from service.weights import load_weights


class Served(nn.Module):
    """The model as it is served: uint8 pixels (n, height, width, 3) in, logits and embedding out.

    Normalisation is part of it, so that a backend compiles it into its graph.
    """

    def __init__(self, model: PVT_V2, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.mean = nn.Buffer(255 * torch.tensor(mean))
        self.scale = nn.Buffer(1 / (255 * torch.tensor(std)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and embedding (n, channels) of `pixels`."""
        x = (pixels.float() - self.mean) * self.scale
        outputs = self.model.forward_all(x.permute(0, 3, 1, 2))  # (n, height, width, 3) -> (n, 3, height, width)
        return outputs.logits, outputs.embedding


def build(card: ModelCard, folder: Path) -> Served:
    """The module of `card` with the weights beside it, in plain float32.

    Raises:
        CardInvalid: the card's number of parameters is not the weights'.
        WeightsInvalid, WeightsUnavailable: as `load_weights`.
    """
    # On the meta device the module costs no memory and no random numbers: every tensor comes from the file.
    with torch.device("meta"):
        model = create(card.variant, num_classes=len(card.labels))
    load_weights(model, folder / card.weights.file, sha256=card.weights.sha256)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != card.parameters:
        raise CardInvalid(f"{folder}: the card says {card.parameters} parameters, the weights have {parameters}")
    return Served(model, card.preprocessing.mean, card.preprocessing.std).eval()


@torch.inference_mode()
def plain_logits(module: Served, images: NDArray[np.uint8]) -> Floats:
    """Logits (n, classes) that the module itself, eager and in float32, gives for `images` (n, height, width, 3)."""
    logits: Floats = module(torch.tensor(images))[0].numpy()
    return logits
