"""What every backend offers, and the module that every backend executes."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.outputs import Floats
from service.pvt_v2 import PVT_V2

Precision = Literal["float32", "bfloat16"]
Batch = NDArray[np.uint8]  # (n, height, width, 3)


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


class Graph(Protocol):
    """A module made ready for batches of one fixed size."""

    def run(self, instance: int, batch: Batch) -> tuple[Floats, Floats]:
        """Logits (n, classes) and embedding (n, channels); one call at a time for each `instance`.

        Raises:
            OutOfMemory: the batch does not fit.
        """
        ...


class Program(Protocol):
    """A module given to a backend, from which graphs of several batch sizes are made."""

    precision: Precision

    def graph(self, size: int) -> Graph:
        """The graph for batches of `size`."""
        ...


class Backend(Protocol):
    """Executes modules on `instances` executors, each of which runs one batch at a time."""

    name: str
    instances: int

    def program(self, module: Served, height: int, width: int) -> Program:
        """Take `module` in, for pictures of `height` x `width`."""
        ...
