"""From a model's numbers to an answer's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Outputs(NamedTuple):
    """What one image gave: `logits` of shape (classes,), the pooled `embedding` of shape (channels,), `stages`.

    Those are the four feature maps of shape (channels, height, width) with strides 4, 8, 16, 32, behind their norms, or
    nothing where they were not asked for. The embedding is the last one's mean.
    """

    logits: Floats
    embedding: Floats
    stages: tuple[Floats, ...] = ()


class Head(NamedTuple):
    """The last layer: logits are `weight` (classes, channels) times the embedding, plus `bias` (classes,)."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class and its share of the softmax over all classes."""

    class_id: int
    label: str
    score: float


def softmax(logits: Floats) -> Floats:
    """Probabilities of the last axis of `logits`, computed so that no exponential overflows."""
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
