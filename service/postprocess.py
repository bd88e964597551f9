"""From a model's outputs to classes, features and class activation maps.

PVT-v2 ends in the mean over the last stage's positions and a linear layer. The two can be exchanged: the layer's row
for a class, applied at each position, yields a map whose mean, plus the bias, is that class's logit. (The idea, for
networks that end like this, is of Zhou et al. 2016, "Learning Deep Features for Discriminative Localization".)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidRequest, ServiceError
from service.results import Floats, ImageResult, InferenceResult, Outputs
from service.store.cards import ModelCard

Array = NDArray[np.floating]

VIRIDIS = np.loadtxt(Path(__file__).parent / "data" / "viridis.tsv", np.uint8)  # (256, 3)


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class and its share of the softmax over all classes."""

    class_id: int
    label: str
    score: float


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis of `logits`, computed so that no exponential overflows."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Floats = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def top_k(logits: Floats, labels: Sequence[str], k: int) -> list[ClassScore]:
    """The `k` best classes of `logits` (classes,), best first; all of them if there are fewer."""
    scores = softmax(logits)
    # Of a thousand classes only the k best are sorted.
    best = scores.argpartition(-k)[-k:] if k < len(scores) else np.arange(len(scores))
    order = best[(-scores[best]).argsort(kind="stable")]
    return [ClassScore(i, labels[i], score) for i, score in zip(order.tolist(), scores[order].tolist(), strict=True)]


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
    """Where an image speaks for a class: `map` (height / 32, width / 32), whose mean plus `bias` is `logit`."""

    inferred: ImageResult
    class_id: int
    label: str
    score: float
    logit: float
    bias: float
    map: Floats


def check_class(class_id: int | None, card: ModelCard) -> None:
    """Raises InvalidRequest when the model of `card` has no such class."""
    if class_id is not None and class_id not in range(len(card.labels)):
        raise InvalidRequest(f"class_id {class_id}: {card.id!r} has the classes 0 to {len(card.labels) - 1}")


def explain(result: InferenceResult, class_id: int | None) -> list[Explanation | ServiceError]:
    """For each image the map of the class `class_id`, or of the image's best class; `result` has stage maps.

    Raises:
        InvalidRequest: as `check_class`.
    """
    check_class(class_id, result.card)
    return [each if isinstance(each, ServiceError) else _explained(result, each, class_id) for each in result.results]


def _explained(result: InferenceResult, image: ImageResult, class_id: int | None) -> Explanation:
    assert result.head is not None  # noqa: S101  it comes with stage maps
    logits, _, stages = image.outputs
    chosen = int(logits.argmax()) if class_id is None else class_id
    return Explanation(
        inferred=image,
        class_id=chosen,
        label=result.card.labels[chosen],
        score=float(softmax(logits)[chosen]),
        logit=float(logits[chosen]),
        bias=float(result.head.bias[chosen]),
        map=np.tensordot(result.head.weight[chosen], stages[-1], axes=1),
    )


def overlay(explanation: Explanation, alpha: float) -> bytes:
    """A PNG: the image as the model saw it, and over it the map in viridis, as opaque as `alpha` (0 to 1) says.

    The map's least value is dark blue and its greatest yellow. It is enlarged bilinearly, which never exceeds the
    values between which it interpolates.
    """
    pixels = explanation.inferred.pixels
    height, width, _ = pixels.shape
    image = Image.fromarray(explanation.map.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    heat = np.asarray(image)
    scaled = (heat - heat.min()) / max(heat.max() - heat.min(), np.float32(1e-12))
    mixed = (1 - alpha) * pixels + alpha * VIRIDIS[(255 * scaled).round().astype(np.uint8)]
    buffer = BytesIO()
    Image.fromarray(mixed.round().astype(np.uint8)).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
