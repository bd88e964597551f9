"""What the engine answers with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.cards import ModelCard
from service.errors import InvalidRequest, ServiceError
from service.outputs import ClassScore, Head, Outputs, top_k

T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds one image spent being decoded (waiting for a thread included), in the queue, and in its batch."""

    decode: float
    queue: float
    infer: float


@dataclass(frozen=True, slots=True)
class Inferred:
    """One image through a model: the picture's own size in pixels, what came out, and how long it took.

    `pixels` is the picture as the model saw it, uint8 (height, width, 3).
    """

    width: int
    height: int
    outputs: Outputs
    timing: Timing
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Answered:
    """One result or error for each image, in the order they came, and the model that answered.

    `size` is its input's height and width; `head` its last layer, there when stage maps were asked for.
    """

    card: ModelCard
    version: str
    size: tuple[int, int]
    head: Head | None
    results: list[Inferred | ServiceError]

    @property
    def model(self) -> str:
        """The model's name."""
        return self.card.id


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best classes of one image, best first."""

    width: int
    height: int
    classes: list[ClassScore]
    timing: Timing


@dataclass(frozen=True, slots=True)
class Predictions:
    """One result or error for each image, in the order they came, and the model that answered."""

    model: str
    version: str
    results: list[Prediction | ServiceError]


@dataclass(frozen=True, slots=True)
class Health:
    """`reasons` says what keeps the service from being live or ready; empty when it is both."""

    live: bool
    ready: bool
    reasons: list[str]


def prediction(image: Inferred | ServiceError, labels: Sequence[str], k: int) -> Prediction | ServiceError:
    """The `k` best classes of `image`, or the error that it is."""
    if isinstance(image, ServiceError):
        return image
    return Prediction(image.width, image.height, top_k(image.outputs.logits, labels, k), image.timing)


def whole(results: Sequence[T | ServiceError], names: Sequence[str | None]) -> list[T]:
    """The results of all pictures, which have these file `names`.

    Raises:
        ServiceError: one of the pictures failed; the error is the first one's, and says which it was.
    """
    for i, result in enumerate(results):
        if isinstance(result, ServiceError):
            if len(results) == 1:
                raise result
            name = names[i]
            called = f" ({name[:100]!r})" if name else ""
            raise InvalidRequest(f"picture {i + 1}{called}: {result}; this form of answer holds all pictures or none")
    return [result for result in results if not isinstance(result, ServiceError)]
