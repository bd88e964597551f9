"""From a model's outputs to the features that a request selects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.arrays import Outputs
from service.errors import InvalidRequest
from service.results import JSON_INSTEAD, ImageResult, InferenceResult, require_all

Array = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class FeatureOptions:
    """Which features, and in which form.

    `stages` counts from 1; `pool` "avg" replaces each stage's map by its mean over the positions; `normalize` scales
    every vector of channels, in a map the one at each position, to a length of 1.
    """

    embedding: bool = True
    stages: tuple[int, ...] = ()
    pool: Literal["avg", "none"] = "none"
    normalize: bool = False
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not self.names:
            raise InvalidRequest("nothing is left to answer with: embedding is false and stages is empty")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return (*(["embedding"] if self.embedding else []), *(f"stage{i}" for i in self.stages))


def features(outputs: Outputs, options: FeatureOptions) -> dict[str, Array]:
    """By name: `embedding` (channels,) and `stage1` to `stage4` (channels, height, width), or (channels,) if pooled."""
    arrays: dict[str, Array] = {"embedding": outputs.embedding} if options.embedding else {}
    for i in options.stages:
        stage: Array = outputs.stages[i - 1]
        arrays[f"stage{i}"] = stage.mean(axis=(1, 2)) if options.pool == "avg" else stage
    return {name: _finished(array, options) for name, array in arrays.items()}


def stacked(result: InferenceResult, options: FeatureOptions, names: Sequence[str | None]) -> dict[str, Array]:
    """The features of all images, whose file names are `names`: each array has a first axis for the image.

    Raises:
        ServiceError: as `require_all`.
    """
    images = [features(each.outputs, options) for each in require_all(result.results, names, JSON_INSTEAD)]
    return {name: np.stack([each[name] for each in images]) for name in images[0]}


def numbers(result: InferenceResult, options: FeatureOptions) -> int:
    """How many numbers a response holds or is made of, to know beforehand whether it is large."""
    first = next((each for each in result.results if isinstance(each, ImageResult)), None)
    if first is None:
        return 0
    maps = sum(first.outputs.stages[i - 1].size for i in options.stages)
    return len(result.results) * (maps + first.outputs.embedding.size)


def _finished(array: Array, options: FeatureOptions) -> Array:
    if options.normalize:
        array = array / np.maximum(np.linalg.norm(array, axis=0, keepdims=True), 1e-12)
    return np.ascontiguousarray(array, options.dtype)
