"""The results of calls, typed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What every result of an image says of its request, which other images may have been in too."""

    request_id: str | None = field(default=None, compare=False, repr=False)
    """What the service's log has it under."""
    timing_ms: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)
    """Milliseconds in the service, from `Server-Timing`: `read`, `wait`, `decode`, `queue`, `infer`, `encode`, `total`
    and some more; of several images the slowest one's. Empty where a proxy removed it."""


class ClassScore(NamedTuple):
    """One class and its score, of the kind that `Prediction.activation` names."""

    class_id: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Prediction(Answer):
    """The best classes of one image, best first; `width` and `height` are those of the image you sent, in pixels.

    `classes` is empty where none reaches its threshold. `activation` says what scores are: shares of a `softmax` over
    all classes, of a `sigmoid` for each class by itself, or with `none` logits. `unknown` says whether the best score
    is too low for any class; None where the model has no bound for that.
    """

    filename: str | None
    width: int
    height: int
    classes: tuple[ClassScore, ...]
    model: str
    version: str
    activation: str = "softmax"
    unknown: bool | None = None

    @property
    def best(self) -> ClassScore:
        """The first of `classes`; raises LookupError where there is none."""
        if not self.classes:
            raise LookupError("no class reached its threshold, so there is no best one: look at classes first")
        return self.classes[0]


@dataclass(frozen=True, slots=True, eq=False)
class Features(Answer):
    """Arrays of one image, or of several stacked on a first axis, in the order of the images.

    `embedding` is (D,) or (n, D). `stages` has the requested stages by number, with pool `none` (C, H, W) or
    (n, C, H, W), with `avg` (C,) or (n, C).
    """

    embedding: Floats
    stages: Mapping[int, Floats]
    model: str
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class Embedding(Answer):
    """The embedding of one image, `vector` (D,); `width` and `height` are those of the image you sent, in pixels."""

    width: int
    height: int
    vector: Floats
    model: str
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class Explanation(Answer):
    """The exact class activation map of one class: `map.mean() + bias` is `logit`."""

    filename: str | None
    width: int
    height: int
    class_id: int
    label: str
    score: float
    logit: float
    bias: float
    map: Floats
    """(H, W), one value for each cell of the last stage."""
    model: str
    version: str
    crop: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom of what `map` covers, in pixels of the upright image; older services do not say it."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model and its state; `details` is everything that the service reports of it."""

    id: str
    variant: str
    version: str
    state: str
    """`available`, `remote`, `loading`, `ready` or `failed`."""
    default: bool
    details: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each class, in order; empty without a head.

        Raises LookupError where the service does not say: `models()` has none, `model(name)` has those of a model in
        the store.
        """
        if "labels" not in self.details:
            raise LookupError(f"no labels are known of {self.id}: of a model in the store, model({self.id!r}) has them")
        return tuple(self.details["labels"])


@dataclass(frozen=True, slots=True)
class Health:
    """`reasons` says what keeps the service from being live or ready; empty when it is both."""

    live: bool
    ready: bool
    reasons: tuple[str, ...]
