import warnings
from typing import Any

import numpy as np
import pytest
import torch

from service.errors import InvalidRequest
from service.postprocess import check_classes, classify, scores
from service.results import Floats
from service.store.cards import Answers, ModelCard, Preprocessing, WeightsFile

EXTREME = np.array([[1000.0, 999.0, -1000.0, 0.0], [0.1, 0.2, 88.8, -103.9], [-1e-6, 1e-6, -20.0, 20.0]], np.float32)


def card(*labels: str, **answers: Any) -> ModelCard:
    return ModelCard(
        id="pvt_v2_b0.mine",
        variant="pvt_v2_b0",
        labels=labels,
        preprocessing=Preprocessing(height=32, width=32),
        weights=WeightsFile(file="model.safetensors", sha256="0" * 64, bytes=1),
        parameters=1,
        licence="MIT",
        source="mine",
        **answers,
    )


def named(logits: list[float], card_: ModelCard, **options: Any) -> list[str]:
    return [each.label for each in classify(np.array(logits, np.float32), card_, **options)["predictions"]]


def of_torch(logits: Floats, activation: str, temperature: float) -> Floats:
    tensor = torch.from_numpy(logits) / temperature
    by_name = {"softmax": torch.softmax(tensor, dim=-1), "sigmoid": torch.sigmoid(tensor), "none": tensor}
    found: Floats = by_name[activation].numpy()
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_scores_agree_with_torch_and_survive_large_logits(activation: Any, temperature: float) -> None:
    temperature = 1.0 if activation == "none" else temperature

    with warnings.catch_warnings(action="error"):
        found = scores(EXTREME, Answers(activation=activation, temperature=temperature))

    assert found.dtype == np.float32
    np.testing.assert_allclose(found, of_torch(EXTREME, activation, temperature), rtol=2e-5, atol=1e-37)


def test_the_best_classes_are_named_best_first() -> None:
    (best, second) = classify(np.array([0, 3, 1, 2], np.float32), card("a", "b", "c", "d"), 2)["predictions"]

    assert [(best.class_id, best.label), (second.class_id, second.label)] == [(1, "b"), (3, "d")]
    assert best.score == pytest.approx(np.exp(3) / np.exp([0, 3, 1, 2]).sum(), rel=1e-5)


def test_more_classes_than_there_are_gives_all() -> None:
    best = classify(np.zeros(3, np.float32), card("a", "b", "c"), 10)["predictions"]

    assert [each.label for each in best] == ["a", "b", "c"]
    assert sum(each.score for each in best) == pytest.approx(1.0)


def test_five_classes_are_named_by_default_and_of_a_multi_label_model_all_that_reach_their_threshold() -> None:
    labels = [f"c{i}" for i in range(8)]

    assert named([*range(8)], card(*labels)) == ["c7", "c6", "c5", "c4", "c3"]
    assert named([0.1, -0.1, 3, 4, 5, 6, 7, 8], card(*labels, activation="sigmoid")) == [
        "c7", "c6", "c5", "c4", "c3", "c2", "c0",
    ]  # fmt: skip
    assert named([0.1, -0.1, 3, 4, 5, 6, 7, 8], card(*labels, activation="sigmoid"), top_k=2) == ["c7", "c6"]


def test_each_class_has_its_own_threshold_and_min_score_replaces_them() -> None:
    # torch.sigmoid of these logits: 0.269, 0.5, 0.731, 0.881
    logits, labels = [-1.0, 0.0, 1.0, 2.0], ("a", "b", "c", "d")
    own = card(*labels, activation="sigmoid", thresholds=(0.25, 0.5, 0.75, 0.9))

    assert named(logits, own) == ["b", "a"]
    assert named(logits, card(*labels, activation="sigmoid", thresholds=0.6)) == ["d", "c"]
    assert named(logits, own, min_score=0.7) == ["d", "c"]
    assert named(logits, own, min_score=0.99) == []
    assert named(logits, own, min_score=0.0) == ["d", "c", "b", "a"]


def test_softmax_and_none_have_thresholds_too() -> None:
    assert named([0.0, 3.0, 1.0], card("a", "b", "c"), min_score=0.1) == ["b", "c"]
    assert named([0.0, 3.0, 1.0], card("a", "b", "c", thresholds=0.5)) == ["b"]
    assert named([0.0, 3.0, -1.0], card("a", "b", "c", activation="none"), min_score=-0.5) == ["b", "a"]
    assert named([0.0, 3.0, -1.0], card("a", "b", "c", activation="none")) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("answers", "logits", "unknown"),
    [
        ({"unknown_below": 0.6}, [0.0, 3.0], False),
        ({"unknown_below": 0.6}, [0.0, 0.1], True),
        ({"unknown_below": 0.6, "temperature": 10.0}, [0.0, 3.0], True),
        ({"unknown_below": 0.6, "activation": "sigmoid"}, [-3.0, 3.0], False),
        ({"unknown_below": 0.6, "activation": "sigmoid"}, [-3.0, 0.1], True),
        ({"unknown_below": 7.0, "activation": "none"}, [-3.0, 6.9], True),
        ({}, [0.0, 0.0], None),
    ],
    ids=str,
)
def test_an_image_is_unknown_where_the_best_score_is_too_low(
    answers: dict[str, Any], logits: list[float], unknown: bool | None
) -> None:
    answer = classify(np.array(logits, np.float32), card("a", "b", **answers))

    assert answer.get("unknown") is unknown
    assert ("unknown" in answer) == (unknown is not None)


@pytest.mark.parametrize(
    ("labels", "asked", "message"),
    [
        ((), {}, "has no classification head, so it names no classes; it computes embeddings"),
        (("a", "b"), {"class_id": 2}, "class_id 2: 'pvt_v2_b0.mine' has the classes 0 to 1"),
        (("a", "b"), {"min_score": 1.5}, "min_score 1.5: must be from 0 to 1"),
        (("a", "b"), {"min_score": -0.5}, "min_score -0.5: must be from 0 to 1"),
    ],
)
def test_what_a_model_can_not_answer_is_refused(labels: tuple[str, ...], asked: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_classes(card(*labels), **asked)


def test_a_score_of_a_model_whose_activation_is_none_may_be_any_number() -> None:
    raw = card("a", "b", activation="none")

    check_classes(raw, min_score=-12.5)
    with pytest.raises(InvalidRequest, match="min_score nan: must be a number"):
        check_classes(raw, min_score=float("nan"))
