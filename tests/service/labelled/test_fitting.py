"""A linear head, against scikit-learn's own pipeline."""

import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from service.errors import InvalidRequest
from service.labelled.fitting import FOLDS, STRENGTHS, Fitted, fit_head, require_fitting
from service.postprocess import softmax

LABELS = "abcd"


Images = tuple[NDArray[np.float32], NDArray[np.int64]]


def blobs(counts: list[int], *, apart: float = 1.5, channels: int = 12, seed: int = 0) -> Images:
    """Normal clouds, one for each class, with channels of very different scales."""
    random = np.random.default_rng(seed)
    centres = random.normal(0, apart, (len(counts), channels))
    classes = np.repeat(np.arange(len(counts)), counts)
    points = centres[classes] + random.normal(0, 1, (len(classes), channels))
    return (points * 10.0 ** random.uniform(-3, 3, channels) + 5).astype(np.float32), classes


def probabilities(fitted: Fitted, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    return softmax(embeddings @ fitted.head.weight.T + fitted.head.bias)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_head_has_the_probabilities_of_scikit_learn(classes: int, balanced: bool) -> None:
    embeddings, truth = blobs([80, 20, 40, 60][:classes])

    fitted = fit_head(embeddings, truth, LABELS[:classes], balanced=balanced)

    weights = "balanced" if balanced else None
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=fitted.strength, max_iter=1000, class_weight=weights))
    theirs.fit(embeddings.astype(float), truth)
    logits = np.log(theirs.predict_proba(embeddings.astype(float))) / fitted.temperature
    assert np.abs(probabilities(fitted, embeddings) - softmax(logits)).max() < 2e-3
    assert fitted.strength in STRENGTHS


def test_what_is_held_out_has_no_part_in_the_head_that_is_measured_on_it() -> None:
    """Classes drawn at random can't be learnt: a head that had seen the images would know them by heart."""
    random = np.random.default_rng(1)
    embeddings, truth = random.normal(size=(200, 300)).astype(np.float32), random.integers(0, 2, 200)

    held_out = fit_head(embeddings, truth, "ab").held_out

    assert held_out
    assert held_out.images in range(38, 43)
    assert held_out.accuracy < 0.75


def test_the_temperature_makes_probabilities_as_likely_as_right_answers_are() -> None:
    """Half of the labels are wrong, so that no image deserves a probability near 1."""
    embeddings, truth = blobs([400, 400], apart=3)
    unseen, unseen_truth = blobs([400, 400], apart=3)
    random = np.random.default_rng(2)
    noisy, noisy_unseen = (np.where(random.random(800) < 0.4, 1 - each, each) for each in (truth, unseen_truth))

    shares = probabilities(fit_head(embeddings, noisy, "ab"), unseen)

    assert shares.max(axis=1).mean() == pytest.approx((shares.argmax(axis=1) == noisy_unseen).mean(), abs=0.05)


def test_classes_of_one_image_are_learnt_and_never_held_out() -> None:
    embeddings, truth = blobs([40, 1, 2, 30], apart=4)

    fitted = fit_head(embeddings, truth, LABELS)

    assert fitted.held_out
    assert fitted.held_out.counts.sum(axis=1).tolist() == [40 // FOLDS, 0, 1, 30 // FOLDS]
    assert (probabilities(fitted, embeddings).argmax(axis=1) == truth).all()


@pytest.mark.parametrize("counts", [[1, 1], [1, 2], [2, 2], [3, 1, 1], [1, 1, 1, 1]])
def test_very_few_images_make_a_head_without_pretending_to_know_its_accuracy(counts: list[int]) -> None:
    embeddings, truth = blobs(counts, apart=4)

    fitted = fit_head(embeddings, truth, LABELS[: len(counts)])

    assert np.isfinite(fitted.head.weight).all()
    assert (fitted.held_out is None) == (max(counts) == 1)
    assert (probabilities(fitted, embeddings).argmax(axis=1) == truth).all()


def test_the_same_seed_gives_the_same_head_and_another_one_other_folds() -> None:
    embeddings, truth = blobs([30, 30], apart=0.5)
    first, again, other = (fit_head(embeddings, truth, "ab", seed=seed) for seed in (3, 3, 4))

    assert all(np.array_equal(*pair) for pair in zip(first.head, again.head, strict=True))
    assert first.held_out
    assert other.held_out
    assert not np.array_equal(first.held_out.counts, other.held_out.counts) or first.temperature != other.temperature


def test_channels_that_never_change_do_no_harm() -> None:
    embeddings, truth = blobs([20, 20])
    embeddings[:, 3] = 7

    assert np.isfinite(fit_head(embeddings, truth, "ab").head.weight).all()


def test_one_class_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidRequest, match="at least two classes; there are images of: 'b'"):
        fit_head(np.ones((3, 4), np.float32), np.ones(3, np.int64), "ab")


def test_without_scikit_learn_the_message_has_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)

    with pytest.raises(InvalidRequest, match=r"pip install 'pvt-serve\[fit\]'"):
        require_fitting()


def test_progress_counts_every_fit() -> None:
    embeddings, truth = blobs([20, 20])
    steps: list[int] = []

    fit_head(embeddings, truth, "ab", step=steps.append)

    assert steps[0] == len(steps) - 1 == len(STRENGTHS) * (FOLDS - 1) + FOLDS + 1
