import numpy as np
import pytest
import torch

from service.postprocess import softmax, top_k


def test_softmax_agrees_with_torch_and_survives_large_logits() -> None:
    logits = np.array([[1000.0, 999.0, -1000.0], [0.1, 0.2, 0.3]], dtype=np.float32)

    expected = torch.softmax(torch.from_numpy(logits), dim=-1).numpy()

    np.testing.assert_allclose(softmax(logits), expected, rtol=1e-5)


def test_top_k_names_the_best_classes_best_first() -> None:
    best = top_k(np.array([0.0, 3.0, 1.0, 2.0], dtype=np.float32), ["a", "b", "c", "d"], 2)

    assert [(each.class_id, each.label) for each in best] == [(1, "b"), (3, "d")]
    assert best[0].score == pytest.approx(np.exp(3) / np.exp([0, 3, 1, 2]).sum(), rel=1e-5)


def test_top_k_of_more_classes_than_there_are_gives_all() -> None:
    best = top_k(np.zeros(3, dtype=np.float32), ["a", "b", "c"], 10)

    assert [each.label for each in best] == ["a", "b", "c"]
    assert sum(each.score for each in best) == pytest.approx(1.0)
