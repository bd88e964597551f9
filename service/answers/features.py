"""From a model's outputs to the features that were asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.answers.outputs import Outputs
from service.answers.results import JSON_INSTEAD, Answered, Inferred, whole
from service.errors import InvalidRequest

Array = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which features, and in which form.

    `stages` counts from 1; `pool` "avg" gives each stage's mean over its positions instead of its map; `normalize`
    scales every vector of channels, in a map the one at each position, to a length of 1.
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


def features(outputs: Outputs, wanted: Wanted) -> dict[str, Array]:
    """By name: `embedding` (channels,) and `stage1` to `stage4` (channels, height, width), or (channels,) if pooled."""
    arrays: dict[str, Array] = {"embedding": outputs.embedding} if wanted.embedding else {}
    for i in wanted.stages:
        stage: Array = outputs.stages[i - 1]
        arrays[f"stage{i}"] = stage.mean(axis=(1, 2)) if wanted.pool == "avg" else stage
    return {name: _finished(array, wanted) for name, array in arrays.items()}


def stacked(answered: Answered, wanted: Wanted, names: Sequence[str | None]) -> dict[str, Array]:
    """The features of all pictures, with these file `names`, each array with a first axis for the picture.

    Raises:
        ServiceError: one of the pictures failed; the error is the first one's, and says which it was.
    """
    pictures = [features(each.outputs, wanted) for each in whole(answered.results, names, JSON_INSTEAD)]
    return {name: np.stack([each[name] for each in pictures]) for name in pictures[0]}


def numbers(answered: Answered, wanted: Wanted) -> int:
    """How many numbers an answer holds or is made of, to tell a large one beforehand."""
    first = next((each for each in answered.results if isinstance(each, Inferred)), None)
    if first is None:
        return 0
    maps = sum(first.outputs.stages[i - 1].size for i in wanted.stages)
    return len(answered.results) * (maps + first.outputs.embedding.size)


def _finished(array: Array, wanted: Wanted) -> Array:
    if wanted.normalize:
        array = array / np.maximum(np.linalg.norm(array, axis=0, keepdims=True), 1e-12)
    return np.ascontiguousarray(array, wanted.dtype)
