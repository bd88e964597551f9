"""The arrays that backends return and postprocessing reads."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]  # (height, width, 3)


class Outputs(NamedTuple):
    """The outputs for one image: `logits` of shape (classes,), the pooled `embedding` of shape (channels,), `stages`.

    `stages` are the four feature maps of shape (channels, height, width) with strides 4, 8, 16 and 32, after their
    norms; it is empty where they were not requested. The embedding is the mean of the last one.
    """

    logits: Floats
    embedding: Floats
    stages: tuple[Floats, ...] = ()


class Head(NamedTuple):
    """The last layer: logits are `weight` (classes, channels) times the embedding, plus `bias` (classes,)."""

    weight: Floats
    bias: Floats
