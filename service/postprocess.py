"""From a model's outputs to classes, features and class activation maps.

PVT-v2 ends in the mean over the last stage's positions and a linear layer. The two can be exchanged: the layer's row
for a class, applied at each position, yields a map whose mean, plus the bias, is that class's logit. (The idea, for
networks that end like this, is of Zhou et al. 2016, "Learning Deep Features for Discriminative Localization".)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidRequest, ServiceError
from service.images.geometry import Box, region
from service.results import Floats, ImageResult, InferenceResult, Outputs
from service.store.cards import Answers, ModelCard

Array = NDArray[np.floating]

VIRIDIS = np.loadtxt(Path(__file__).parent / "data" / "viridis.tsv", np.uint8)  # (256, 3)


_SMOOTH = Image.Resampling.BICUBIC
DEFAULT_CLASSES = 5  # in an answer, of a model that names one class of several
MOST_CLASSES = 1000


@dataclass(slots=True)  # not frozen, which would double what making one costs
class ClassScore:
    """One class and its score, which the card's activation makes of its logit."""

    class_id: int
    label: str
    score: float


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis of `logits`, computed so that no exponential overflows."""
    # The ufuncs' own methods: those of arrays come to the same, by way of Python.
    exponentials: Floats = np.exp(logits - np.maximum.reduce(logits, axis=-1, keepdims=True))
    total: Floats = np.add.reduce(exponentials, axis=-1, keepdims=True)
    shares: Floats = exponentials / total
    return shares


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + exp(-x)) of each of `logits`, computed so that no exponential overflows and small values keep digits."""
    small = np.exp(-np.abs(logits))
    shares: Floats = np.where(logits >= 0, np.float32(1), small) / (1 + small)
    return shares


def scores(logits: Floats, answers: Answers) -> Floats:
    """The score of each class, as `answers` says; `logits` has the classes on its last axis."""
    if answers.temperature != 1:
        logits = logits / np.float32(answers.temperature)
    if answers.activation == "none":
        return logits
    return softmax(logits) if answers.activation == "softmax" else sigmoid(logits)


def classify(
    logits: Floats, card: ModelCard, top_k: int | None = None, min_score: float | None = None
) -> dict[str, Any]:
    """The answer for `logits` (classes,): `predictions`, best first, and `unknown` where the card has a bound for it.

    The predictions are the ClassScore of each class that reaches `min_score`, by default the card's thresholds. `top_k`
    is how many at the most; by default DEFAULT_CLASSES, but of a multi-label model all, up to MOST_CLASSES.
    """
    found, least = scores(logits, card), card.least_scores if min_score is None else min_score
    k = top_k or (MOST_CLASSES if card.activation == "sigmoid" else DEFAULT_CLASSES)
    if least is not None:
        best = np.flatnonzero(found >= (np.array(least, np.float32) if isinstance(least, tuple) else least))
    else:  # of a thousand classes only the k best are sorted
        best = found.argpartition(-k)[-k:] if k < len(found) else np.arange(len(found))
    order = best[(-found[best]).argsort(kind="stable")][:k]
    labels, pairs = card.labels, zip(order.tolist(), found[order].tolist(), strict=True)
    answer: dict[str, Any] = {"predictions": [ClassScore(i, labels[i], each) for i, each in pairs]}
    if card.unknown_below is not None:
        answer["unknown"] = bool(found.max() < card.unknown_below)
    return answer


def check_classes(card: ModelCard, class_id: int | None = None, min_score: float | None = None) -> None:
    """Raises InvalidRequest when the model of `card` names no classes, has no such class, or no such scores."""
    if not card.labels:
        raise InvalidRequest(
            f"model {card.id!r} has no classification head, so it names no classes; it computes embeddings and feature "
            "maps: send the image to /features or /v1/embeddings (pvt-serve embed), or name another model"
        )
    if class_id is not None and class_id not in range(len(card.labels)):
        raise InvalidRequest(f"class_id {class_id}: {card.id!r} has the classes 0 to {len(card.labels) - 1}")
    if min_score is not None and not (isfinite(min_score) if card.activation == "none" else 0 <= min_score <= 1):
        range_ = "a number" if card.activation == "none" else "from 0 to 1"
        raise InvalidRequest(f"min_score {min_score:g}: must be {range_}, as the scores of {card.id!r} are")


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
    return {name: feature(outputs, name, options) for name in options.names}


def feature(outputs: Outputs, name: str, options: FeatureOptions) -> Array:
    """The one called `name`."""
    array: Array = outputs.embedding if name == "embedding" else outputs.stages[int(name.removeprefix("stage")) - 1]
    if name != "embedding" and options.pool == "avg":
        array = array.mean(axis=(1, 2))
    if options.normalize:
        array = array / np.maximum(np.linalg.norm(array, axis=0, keepdims=True), 1e-12)
    return np.ascontiguousarray(array, options.dtype)


def numbers(result: InferenceResult, stages: Sequence[int] = ()) -> int:
    """How many numbers a response is made of that reads these `stages`, to know beforehand whether it is large."""
    first = next((each.outputs for each in result.results if isinstance(each, ImageResult)), None)
    return len(result.results) * (first.embedding.size + sum(first.stages[i - 1].size for i in stages)) if first else 0


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where an image speaks for a class: `map` (height / 32, width / 32), whose mean plus `bias` is `logit`.

    `region` is the rectangle of the upright image, in its own pixels, that the map covers.
    """

    inferred: ImageResult
    class_id: int
    label: str
    score: float
    logit: float
    bias: float
    region: Box
    map: Floats


def explain(result: InferenceResult, class_id: int | None) -> list[Explanation | ServiceError]:
    """For each image the map of the class `class_id`, or of the image's best class; `result` has stage maps.

    Raises:
        InvalidRequest: as `check_classes`.
    """
    check_classes(result.card, class_id)
    return [each if isinstance(each, ServiceError) else _explained(result, each, class_id) for each in result.results]


def _explained(result: InferenceResult, image: ImageResult, class_id: int | None) -> Explanation:
    assert result.head is not None  # noqa: S101  it comes with stage maps and labels
    logits, _, stages = image.outputs
    chosen = int(logits.argmax()) if class_id is None else class_id
    return Explanation(
        inferred=image,
        class_id=chosen,
        label=result.card.labels[chosen],
        score=float(scores(logits, result.card)[chosen]),
        logit=float(logits[chosen]),
        bias=float(result.head.bias[chosen]),
        region=region(image.width, image.height, result.geometry),
        map=np.tensordot(result.head.weight[chosen], stages[-1], axes=1),
    )


def overlay(explanation: Explanation, alpha: float, longer_side: int | None = None) -> bytes:
    """A PNG: the image as the model saw it, and over it the map in viridis, as opaque as `alpha` (0 to 1) says.

    Both are enlarged, or reduced, until the longer side has `longer_side` pixels; by default it is the input's. The
    map's least value is dark blue and its greatest yellow. It is enlarged bilinearly, which never exceeds the values
    between which it interpolates.
    """
    shown = Image.fromarray(explanation.inferred.pixels)
    if longer_side:
        scale = longer_side / max(shown.size)
        shown = shown.resize((max(1, round(shown.width * scale)), max(1, round(shown.height * scale))), _SMOOTH)
    pixels, (width, height) = np.asarray(shown), shown.size
    image = Image.fromarray(explanation.map.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    heat = np.asarray(image)
    scaled = (heat - heat.min()) / max(heat.max() - heat.min(), np.float32(1e-12))
    mixed = (1 - alpha) * pixels + alpha * VIRIDIS[(255 * scaled).round().astype(np.uint8)]
    buffer = BytesIO()
    Image.fromarray(mixed.round().astype(np.uint8)).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
