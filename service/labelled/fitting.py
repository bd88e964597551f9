"""A linear head on a frozen backbone, fitted to the embeddings of labelled images, as a version in the model store.

Everything is decided on held-out images: how strongly the head is regularised, its accuracy, and its temperature.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest
from service.labelled.measures import Confusion
from service.results import Floats, Head

FOLDS = 5
STRENGTHS = tuple(10.0**n for n in range(-4, 3))
"""Inverse strengths of regularisation, scikit-learn's `C`, for embeddings scaled to a variance of 1."""
_DEFAULT_STRENGTH = 1.0  # with too few images to choose; scikit-learn's own default
_TEMPERATURES = 0.1, 10.0
_NEVER = -1  # the fold of images that are never held out
_ITERATIONS = 1000

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A `head` for embeddings, whose logits are calibrated: they are divided by `temperature` already.

    `strength` is the chosen one of `STRENGTHS`. `held_out` has the fold that had no part in choosing it, as a head
    answers that was fitted without it; None where every class has one image only.
    """

    head: Head
    strength: float
    temperature: float
    held_out: Confusion | None


def require_fitting() -> None:
    """Raises InvalidRequest, with the line to type, where scikit-learn is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401, PLC0415  an extra, and slow to import
    except ImportError as error:
        raise InvalidRequest("fitting needs scikit-learn: pip install 'pvt-serve[fit]'") from error


def fit_head(
    embeddings: Floats,
    classes: Ints,
    labels: Sequence[str],
    *,
    seed: int = 0,
    balanced: bool = False,
    step: Callable[[int], None] = lambda _: None,
) -> Fitted:
    """Multinomial logistic regression on `embeddings` (n, channels) with class numbers `classes` (n,) of `labels`.

    `seed` decides which images are held out. `balanced` gives each class the same weight, whatever its number of
    images. `step` is called with the number of fits before the first, then with 0 for each.

    The temperature is that of Guo et al. 2017, "On Calibration of Modern Neural Networks": logits are divided by it so
    that softmax gives held-out images their most likely probabilities. Targets are smoothed by one image as in Platt
    1999, since a few images that are all right would ask for certainty.

    Raises:
        InvalidRequest: scikit-learn is missing, or there are fewer than two classes with images.
    """
    require_fitting()
    if len(present := np.unique(classes)) < 2:  # noqa: PLR2004
        names = ", ".join(repr(labels[i]) for i in present) or "none"
        raise InvalidRequest(f"a head needs images of at least two classes; there are images of: {names}")
    mean, spread = embeddings.mean(axis=0, dtype=np.float64), embeddings.astype(np.float64).std(axis=0)
    scale = np.where(spread > 0, spread, 1)
    scaled = (embeddings - mean) / scale
    fit = partial(_fit, scaled, classes, len(labels), balanced=balanced)
    folds = _folds(classes, seed)
    count = int(folds.max()) + 1
    step((len(STRENGTHS) * (count - 1) if count > 2 else 0) + count + 1)  # noqa: PLR2004  fold 0 has no say in strength
    strength = _strength(fit, scaled, classes, folds, step)
    logits, known = _held_out_logits(fit, strength, scaled, folds, len(labels), step), folds != _NEVER
    temperature = _temperature(logits[known], classes[known]) if known.any() else 1.0
    table = Confusion.of(labels, classes[held_out := folds == 0].tolist(), logits[held_out].argmax(1).tolist())
    step(0)
    final = fit(strength, np.ones(len(classes), bool)).unscaled(mean, scale)
    head = Head((final.weight / temperature).astype(np.float32), (final.bias / temperature).astype(np.float32))
    return Fitted(head, strength, temperature, table if held_out.any() else None)


def _held_out_logits(  # noqa: PLR0917  as `fit_head` has them
    fit: "Callable[..., _Linear]",
    strength: float,
    scaled: Doubles,
    folds: Ints,
    classes: int,
    step: Callable[[int], None],
) -> Doubles:
    """Logits (n, classes) of each image by a head that was fitted to the other folds."""
    logits = np.zeros((len(scaled), classes))
    for fold in range(int(folds.max()) + 1):
        step(0)
        logits[folds == fold] = fit(strength, folds != fold).logits(scaled[folds == fold])
    return logits


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    weight: Doubles  # (classes, channels)
    bias: Doubles

    def logits(self, embeddings: Doubles) -> Doubles:
        """(n, classes) for (n, channels)."""
        return embeddings @ self.weight.T + self.bias

    def unscaled(self, mean: Doubles, scale: Doubles) -> "_Linear":
        """The same for embeddings e in place of (e - mean) / scale."""
        weight = self.weight / scale
        return _Linear(weight, self.bias - weight @ mean)


def _fit(
    scaled: Doubles, classes: Ints, count: int, strength: float, which: NDArray[np.bool_], *, balanced: bool
) -> _Linear:
    """The layer for the images that `which` says. A class that has none of them is never answered."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  an extra, and slow to import

    model = LogisticRegression(C=strength, max_iter=_ITERATIONS, class_weight="balanced" if balanced else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not quite converged, which the held-out images judge
        model.fit(scaled[which], classes[which])
    weight, bias = np.zeros((count, scaled.shape[1])), np.full(count, -1e3)
    if len(model.classes_) == 2:  # one row, whose sigmoid is the second class's  # noqa: PLR2004
        rows, biases = np.vstack([-model.coef_, model.coef_]) / 2, np.hstack([-model.intercept_, model.intercept_]) / 2
    else:
        rows, biases = model.coef_, model.intercept_
    weight[model.classes_], bias[model.classes_] = rows, biases
    return _Linear(weight, bias)


def _folds(classes: Ints, seed: int) -> Ints:
    """A fold (n,) for each image, of each class the same share; `_NEVER` for a class with one image."""
    random, folds = np.random.default_rng(seed), np.full(len(classes), _NEVER)
    for i in np.unique(classes):
        members = random.permutation(np.flatnonzero(classes == i))
        if len(members) > 1:
            folds[members] = np.arange(len(members)) % FOLDS
    return folds


def _strength(
    fit: Callable[..., _Linear], scaled: Doubles, classes: Ints, folds: Ints, step: Callable[[int], None]
) -> float:
    """The strength with the least log loss on every fold but 0, each by a head fitted without that fold and fold 0.

    A class whose only images are in the two is left out of that fold's loss.
    """
    chosen = range(1, int(folds.max()) + 1)
    if len(chosen) < 2:  # noqa: PLR2004
        return _DEFAULT_STRENGTH
    losses = []
    for strength in STRENGTHS:
        loss = 0.0
        for fold in chosen:
            step(0)
            which = (folds != fold) & (folds != 0)
            judged = (folds == fold) & np.isin(classes, classes[which])
            if len(np.unique(classes[which])) > 1:
                layer = fit(strength, which)
                loss += _log_loss(layer.logits(scaled[judged]), classes[judged])
        losses.append(loss)
    return STRENGTHS[int(np.argmin(losses))]


def _log_loss(logits: Doubles, classes: Ints, smoothing: float = 0.0) -> float:
    """The sum of cross entropies with targets of 1 - smoothing, and the rest for the others."""
    shares = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    own = shares[np.arange(len(classes)), classes]
    others = (shares.sum(axis=1) - own) / (logits.shape[1] - 1)
    return -float(((1 - smoothing) * own + smoothing * others).sum())


def _temperature(logits: Doubles, classes: Ints) -> float:
    from scipy.optimize import minimize_scalar  # noqa: PLC0415  comes with scikit-learn

    smoothing = 1 / (len(classes) + 2)
    found = minimize_scalar(
        lambda log: _log_loss(logits / np.exp(log), classes, smoothing),
        bounds=np.log(_TEMPERATURES),
        method="bounded",
    )
    return float(np.exp(found.x))
