"""How well answers agree with the truth: accuracy, figures of each class, and whether a difference is chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Z = 1.96  # 95 % of a normal distribution


class Mistake(NamedTuple):
    """`images` of the class `truth` were answered with the class `answer`."""

    truth: int
    answer: int
    images: int


@dataclass(frozen=True, slots=True, eq=False)
class Confusion:
    """`counts[i, j]` images of class i were answered with class j; `labels` are the names of both."""

    labels: Sequence[str]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, labels: Sequence[str], truth: Sequence[int], answers: Sequence[int]) -> "Confusion":
        """The table of class numbers `truth` and `answers`."""
        counts = np.zeros((len(labels), len(labels)), np.int64)
        np.add.at(counts, (np.asarray(truth, int), np.asarray(answers, int)), 1)
        return cls(labels, counts)

    @property
    def images(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    @property
    def right(self) -> int:
        """How many were answered with their own class."""
        return int(self.counts.trace())

    @property
    def accuracy(self) -> float:
        """The share of images that were answered with their own class."""
        return self.right / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Where the accuracy lies with a probability of 95 %: Wilson's score interval (1927)."""
        n, p = self.images, self.accuracy
        centre, spread = p + _Z**2 / (2 * n), _Z * sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return max(0.0, (centre - spread) / (1 + _Z**2 / n)), min(1.0, (centre + spread) / (1 + _Z**2 / n))

    def recall(self, i: int) -> float | None:
        """The share of images of class i that were answered with it; None without an image."""
        total = int(self.counts[i].sum())
        return int(self.counts[i, i]) / total if total else None

    def precision(self, i: int) -> float | None:
        """The share of answers with class i that were right; None without an answer."""
        total = int(self.counts[:, i].sum())
        return int(self.counts[i, i]) / total if total else None

    @property
    def seen(self) -> list[int]:
        """The classes with images or answers."""
        return np.flatnonzero(self.counts.sum(0) + self.counts.sum(1)).tolist()

    @property
    def mistakes(self) -> list[Mistake]:
        """What was taken for what, the most frequent first."""
        wrong = self.counts - np.diag(self.counts.diagonal())
        found = [Mistake(int(i), int(j), int(wrong[i, j])) for i, j in np.argwhere(wrong)]
        return sorted(found, key=lambda each: -each.images)


def mcnemar(only_first: int, only_second: int) -> float:
    """The probability that two equally good classifiers differ by so much: the exact, two-sided test of McNemar (1947).

    `only_first` images were right only with one of them, `only_second` only with the other.
    """
    n, few = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(comb(n, k) for k in range(few + 1)) / (1 << n))
