"""The module that every backend executes, made from a card and its weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.weights import load_weights
from service.errors import CardInvalid
from service.results import Floats, Head
from service.store.cards import ModelCard


class Served(nn.Module):
    """The model as it is served: uint8 pixels (n, height, width, 3) in, logits, embedding and maps of `stages` out.

    It normalises the pixels itself, so that a backend compiles that into its graph.
    """

    def __init__(self, model: PVT_V2, mean: Sequence[float], std: Sequence[float], stages: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = model
        self.stages = tuple(stages)
        self.mean = nn.Buffer(255 * torch.tensor(mean))
        self.scale = nn.Buffer(1 / (255 * torch.tensor(std)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits (n, classes), embedding (n, channels) and stage maps (n, channels, height, width) of `pixels`."""
        return self.outputs(self.normalised(pixels))

    def normalised(self, pixels: Tensor) -> Tensor:
        """The model's input for `pixels`: float32 images (n, 3, height, width)."""
        x = (pixels.float() - self.mean) * self.scale
        return x.permute(0, 3, 1, 2)  # (n, height, width, 3) -> (n, 3, height, width)

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """As `forward`, for images that are normalised already."""
        logits, embedding, maps = self.model.forward_all(images, self.stages)
        return logits, embedding, *maps

    def head(self) -> Head:
        """A copy of the model's last layer."""
        head = self.model.head
        assert isinstance(head, nn.Linear)  # noqa: S101  a card has labels, so it is one
        return Head(head.weight.detach().numpy().copy(), head.bias.detach().numpy().copy())


def build(card: ModelCard, folder: Path, stages: Sequence[int] = ()) -> Served:
    """The module of `card` with the weights in `folder`, in plain float32; it returns the maps of `stages` too.

    Raises:
        CardInvalid: the card and the weights differ in the number of parameters.
        WeightsInvalid, WeightsUnavailable: as `load_weights`.
    """
    # On the meta device the module costs no memory and no random numbers: every tensor comes from the file.
    with torch.device("meta"):
        model = create(card.variant, num_classes=len(card.labels))
    load_weights(model, folder / card.weights.file, sha256=card.weights.sha256)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != card.parameters:
        raise CardInvalid(f"{folder}: the card says {card.parameters} parameters, the weights have {parameters}")
    return Served(model, card.preprocessing.mean, card.preprocessing.std, stages).eval()


@torch.inference_mode()
def plain_logits(module: Served, images: NDArray[np.uint8]) -> Floats:
    """Logits (n, classes) of the module itself, eager and in float32, for `images` (n, height, width, 3)."""
    logits: Floats = module(torch.tensor(images))[0].numpy()
    return logits
