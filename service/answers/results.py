"""What the engine answers with."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.answers.outputs import ClassScore, Head, Outputs, top_k
from service.errors import ServiceError
from service.store.cards import ModelCard

T = TypeVar("T")
JSON_INSTEAD = ", application/json answers the others"
_TOLD = 3  # of the pictures that failed


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

    @property
    def numbers(self) -> int:
        """How many numbers there are in all, stage maps included."""
        outputs = [each.outputs for each in self.results if isinstance(each, Inferred)]
        return sum(sum(map(np.size, (each.logits, each.embedding, *each.stages))) for each in outputs)


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


def whole(results: Sequence[T | ServiceError], names: Sequence[str | None], instead: str = "") -> list[T]:
    """The results of all pictures, which have these file `names`; `instead` is what else to ask for.

    Raises:
        ServiceError: pictures failed; the error is of the first one's class, and says which they were.
    """
    failed = [(i, each) for i, each in enumerate(results) if isinstance(each, ServiceError)]
    if failed:
        _, first = failed[0]
        if len(results) == 1:
            raise first
        told = [f"picture {i + 1}{f' ({name[:100]!r})' if (name := names[i]) else ''}: {e}" for i, e in failed[:_TOLD]]
        more = [f"and {len(failed) - _TOLD} more"] if len(failed) > _TOLD else []
        error = copy(first)
        error.args = ("; ".join([*told, *more, f"this form of answer holds all pictures or none{instead}"]),)
        raise error
    return [result for result in results if not isinstance(result, ServiceError)]
