"""Figures of agreement, against scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, precision_score, recall_score

from service.labelled.measures import Confusion, Mistake, mcnemar


def test_a_table_has_the_figures_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 5, 300)
    answers = np.where(random.random(300) < 0.7, truth, random.integers(0, 5, 300))

    table = Confusion.of("abcde", truth.tolist(), answers.tolist())

    assert np.array_equal(table.counts, confusion_matrix(truth, answers))
    assert table.accuracy == pytest.approx(accuracy_score(truth, answers))
    assert [table.recall(i) for i in range(5)] == pytest.approx(recall_score(truth, answers, average=None).tolist())
    assert [table.precision(i) for i in range(5)] == pytest.approx(
        precision_score(truth, answers, average=None).tolist()
    )
    low, high = binomtest(table.right, table.images).proportion_ci(method="wilson")
    assert table.interval == pytest.approx((low, high), abs=1e-4)
    assert sum(each.images for each in table.mistakes) == table.images - table.right


def test_a_class_without_images_or_answers_has_no_figures() -> None:
    table = Confusion.of("abc", [0, 0, 0], [0, 1, 1])

    assert (table.recall(1), table.precision(1), table.precision(2)) == (None, 0.0, None)
    assert table.seen == [0, 1]
    assert table.mistakes == [Mistake(0, 1, 2)]


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (12, 3), (3, 12), (7, 7), (900, 700), (4000, 0)])
def test_mcnemar_is_the_two_sided_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0

    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
