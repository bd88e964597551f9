"""What models and the engine take and return."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.errors import ServiceError
from service.images.geometry import Geometry
from service.store.cards import ModelCard

T = TypeVar("T")
Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]  # (height, width, 3)
# An encoded image; pixels (height, width, 3) in the model's own size; or the error that reading it already met.
Image = bytes | Pixels | ServiceError
Size = tuple[int, int]  # height and width
JSON_INSTEAD = ", application/json answers the others"
_MOST_LISTED = 3  # of the images that failed


class Outputs(NamedTuple):
    """The outputs for one image: `logits` of shape (classes,), the pooled `embedding` of shape (channels,), `stages`.

    `stages` are the four feature maps of shape (channels, height, width) with strides 4, 8, 16 and 32, after their
    norms; it is empty where they were not requested. The embedding is the mean of the last one. A model without a head
    has no classes.
    """

    logits: Floats
    embedding: Floats
    stages: tuple[Floats, ...] = ()


class Head(NamedTuple):
    """The last layer: logits are `weight` (classes, channels) times the embedding, plus `bias` (classes,)."""

    weight: Floats
    bias: Floats


class Timing(NamedTuple):
    """Seconds that one image waited to be decoded, was decoded, queued for an instance, and run in its batch."""

    wait: float
    decode: float
    queue: float
    infer: float


@dataclass(frozen=True, slots=True)
class ImageResult:
    """One image after inference: its own size in pixels, the model's outputs, and the time that they took.

    `pixels` is the image as the model saw it, uint8 (height, width, 3). `batch_size` counts the images of its batch,
    and `batch_reason` says why that ran when it did. `reuse` says that it is another request's: from the content cache
    (`hit`, without pixels where it has no stage maps), or computed at the same time (`coalesced`).
    """

    width: int
    height: int
    outputs: Outputs
    timing: Timing
    pixels: Pixels
    batch_size: int = 1
    batch_reason: str = ""
    reuse: Literal["", "hit", "coalesced"] = ""


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """One result or error for each image, in the order of the request, and the model that made them.

    `size` is the height and width of the model's input; `head` is its last layer, if it has one and stage maps were
    requested. `load_seconds`: how long they waited for the model to be loaded, or compiled for that size.
    """

    card: ModelCard
    version: str
    size: Size
    head: Head | None
    results: list[ImageResult | ServiceError]
    load_seconds: float = 0.0

    @property
    def geometry(self) -> Geometry:
        """How the images were brought to the model's input."""
        return replace(self.card.preprocessing.geometry, height=self.size[0], width=self.size[1])

    @property
    def model(self) -> str:
        """The model's name."""
        return self.card.id

    @property
    def numbers(self) -> int:
        """How many numbers there are in all, stage maps included."""
        outputs = [each.outputs for each in self.results if isinstance(each, ImageResult)]
        return sum(sum(map(np.size, (each.logits, each.embedding, *each.stages))) for each in outputs)


@dataclass(frozen=True, slots=True)
class Health:
    """`reasons` says what keeps the service from being live or ready; empty when it is both."""

    live: bool
    ready: bool
    reasons: list[str]


def require_all(results: Sequence[T | ServiceError], names: Sequence[str | None], alternative: str = "") -> list[T]:
    """The results of all images, whose file names are `names`; `alternative` says which form holds the others.

    Raises:
        ServiceError: an image failed. The error has the class of the first failure and lists the images.
    """
    failed = [(i, each) for i, each in enumerate(results) if isinstance(each, ServiceError)]
    if not failed:
        return [result for result in results if not isinstance(result, ServiceError)]
    if len(results) == 1:
        raise failed[0][1]
    listed = [
        f"image {i + 1}{f' ({name[:100]!r})' if (name := names[i]) else ''}: {each}"
        for i, each in failed[:_MOST_LISTED]
    ]
    more = [f"and {len(failed) - _MOST_LISTED} more"] if len(failed) > _MOST_LISTED else []
    error = copy(failed[0][1])
    error.args = ("; ".join([*listed, *more, f"this form of answer holds all images or none{alternative}"]),)
    raise error
