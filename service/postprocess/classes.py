"""From logits to the best classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.arrays import Floats
from service.errors import ServiceError
from service.results import InferenceResult, Timing


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class and its share of the softmax over all classes."""

    class_id: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best classes of one image, best first."""

    width: int
    height: int
    classes: list[ClassScore]
    timing: Timing


@dataclass(frozen=True, slots=True)
class Predictions:
    """One result or error for each image, in the order of the request, and the model that made them."""

    model: str
    version: str
    results: list[Prediction | ServiceError]


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


def predictions(result: InferenceResult, k: int) -> Predictions:
    """The `k` best classes of each image of `result`; the error of one that failed stays in its place."""
    labels = result.card.labels
    results = [
        image
        if isinstance(image, ServiceError)
        else Prediction(image.width, image.height, top_k(image.outputs.logits, labels, k), image.timing)
        for image in result.results
    ]
    return Predictions(result.model, result.version, results)
