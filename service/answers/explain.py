"""The exact class activation map, and a picture of it.

PVT-v2 ends in the mean over the last stage's positions and a linear layer. The two can be exchanged: the layer's row
for a class, applied at each position, gives a map whose mean, plus the bias, is that class's logit. (The idea, for
networks that end like this, is of Zhou et al. 2016, "Learning Deep Features for Discriminative Localization".)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.answers.colours import VIRIDIS
from service.answers.outputs import Floats, softmax
from service.answers.results import Answered, Inferred
from service.errors import InvalidRequest, ServiceError
from service.store.cards import ModelCard


@dataclass(frozen=True, slots=True)
class Explanation:
    """What speaks for one class where: `map` (height / 32, width / 32), whose mean plus `bias` is `logit`."""

    inferred: Inferred
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


def explain(answered: Answered, class_id: int | None) -> list[Explanation | ServiceError]:
    """The map of the class `class_id`, or of each picture's best one, for each picture.

    Raises:
        InvalidRequest: as `check_class`.
    """
    check_class(class_id, answered.card)
    return [_explained(answered, each, class_id) for each in answered.results]


def numbers(answered: Answered) -> int:
    """How many numbers the maps are made of, to tell a large answer beforehand."""
    return sum(each.outputs.stages[-1].size for each in answered.results if isinstance(each, Inferred))


def maps(explanations: Sequence[Explanation]) -> Floats:
    """All maps in one array (n, height / 32, width / 32)."""
    return np.stack([each.map for each in explanations])


def overlay(explanation: Explanation, alpha: float) -> bytes:
    """A PNG: the picture as the model saw it, and on it, as opaque as `alpha` from 0 to 1, the map in viridis.

    The map's least value is dark blue and its greatest yellow. It is enlarged bilinearly, which never goes beyond the
    values it lies between.
    """
    pixels = explanation.inferred.pixels
    heat = VIRIDIS[(255 * _scaled(_enlarged(explanation.map, pixels.shape[:2]))).round().astype(np.uint8)]
    mixed = (1 - alpha) * pixels + alpha * heat
    buffer = BytesIO()
    Image.fromarray(mixed.round().astype(np.uint8)).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _explained(answered: Answered, result: Inferred | ServiceError, class_id: int | None) -> Explanation | ServiceError:
    if isinstance(result, ServiceError):
        return result
    assert answered.head is not None  # noqa: S101  it comes with stage maps
    logits, _, stages = result.outputs
    chosen = int(logits.argmax()) if class_id is None else class_id
    weight, bias = answered.head
    heat: Floats = np.tensordot(weight[chosen], stages[-1], axes=1)
    return Explanation(
        inferred=result,
        class_id=chosen,
        label=answered.card.labels[chosen],
        score=float(softmax(logits)[chosen]),
        logit=float(logits[chosen]),
        bias=float(bias[chosen]),
        map=heat,
    )


def _enlarged(heat: Floats, shape: tuple[int, int]) -> Floats:
    height, width = shape
    enlarged = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(enlarged)


def _scaled(heat: Floats) -> NDArray[np.float32]:
    least, most = heat.min(), heat.max()
    scaled: NDArray[np.float32] = (heat - least) / max(most - least, np.float32(1e-12))
    return scaled
