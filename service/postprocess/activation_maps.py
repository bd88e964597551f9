"""The exact class activation map, and an image of it.

PVT-v2 ends in the mean over the last stage's positions and a linear layer. The two can be exchanged: the layer's row
for a class, applied at each position, yields a map whose mean, plus the bias, is that class's logit. (The idea, for
networks that end like this, is of Zhou et al. 2016, "Learning Deep Features for Discriminative Localization".)
"""

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from service.arrays import Floats
from service.errors import InvalidRequest, ServiceError
from service.postprocess.classes import softmax
from service.results import ImageResult, InferenceResult
from service.store.cards import ModelCard

_TABLE = (
    "RAFURAJWRQRXRQVZRgdaRghcRgpdRgteRw1gRw5hRxBjRxFkRxNlSBRnSBZoSBdpSBhqSBpsSBttSBxuSB1vSB9wSCBxSCFzSCN0SCR1SCV2"
    "SCZ3SCh4SCl5Ryp6Ryx6Ry17Ry58Ry99RjB+RjJ+RjN/RjSARTWBRTeBRTiCRDmDRDqDRDuEQz2EQz6FQj+FQkCGQkGGQUKHQUSHQEWIQEaI"
    "P0eIP0iJPkmJPkqJPkyKPU2KPU6KPE+KPFCLO1GLO1KLOlOLOlSMOVWMOVaMOFiMOFmMN1qMN1uNNlyNNl2NNV6NNV+NNGCNNGGNM2KNM2ON"
    "MmSOMmWOMWaOMWeOMWiOMGmOMGqOL2uOL2yOLm2OLm6OLm+OLXCOLXGOLHGOLHKOLHOOK3SOK3WOKnaOKneOKniOKXmOKXqOKXuOKHyOKH2O"
    "J36OJ3+OJ4COJoGOJoKOJoKOJYOOJYSOJYWOJIaOJIeOI4iOI4mOI4qNIouNIoyNIo2NIY6NIY+NIZCNIZGMIJKMIJKMIJOMH5SMH5WLH5aL"
    "H5eLH5iLH5mKH5qKHpuKHpyJHp2JH56JH5+IH6CIH6GIH6GHH6KHIKOGIKSGIaWFIaaFIqeFIqiEI6mDJKqDJauCJayCJq2BJ62BKK6AKa9/"
    "KrB/LLF+LbJ9LrN8L7R8MbV7MrZ6NLZ5Nbd5N7h4OLl3Orp2O7t1Pbx0P7xzQL1yQr5xRL9wRsBvSMFuSsFtTMJsTsNrUMRqUsVpVMVoVsZn"
    "WMdlWshkXMhjXsliYMpgY8tfZcteZ8xcac1bbM1abs5YcM9Xc9BWddBUd9FTetFRfNJQf9NOgdNNhNRLhtVJidVIi9ZGjtZFkNdDk9dBldhA"
    "mNg+m9k8ndk7oNo5oto3pds2qNs0qtwyrdwwsN0vst0ttd4ruN4put4ovd8mwN8lwt8jxeAhyOAgyuEfzeEd0OEc0uIb1eIa2OIZ2uMZ3eMY"
    "3+MY4uQY5eQZ5+QZ6uUa7OUb7+Uc8eUd9OYe9uYg+OYh++cj/ecl"
)

# A colour map whose steps look equally large: viridis by Smith, van der Walt and Firing (CC0), from matplotlib.
VIRIDIS = np.frombuffer(b64decode(_TABLE), np.uint8).reshape(256, 3)


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
    """For each image the map of the class `class_id`, or of the image's best class.

    Raises:
        InvalidRequest: as `check_class`.
    """
    check_class(class_id, result.card)
    return [
        image if isinstance(image, ServiceError) else _explained(result, image, class_id) for image in result.results
    ]


def numbers(result: InferenceResult) -> int:
    """How many numbers the maps are made of, to know beforehand whether the response is large."""
    return sum(each.outputs.stages[-1].size for each in result.results if isinstance(each, ImageResult))


def maps(explanations: Sequence[Explanation]) -> Floats:
    """All maps in one array (n, height / 32, width / 32)."""
    return np.stack([each.map for each in explanations])


def overlay(explanation: Explanation, alpha: float) -> bytes:
    """A PNG: the image as the model saw it, and over it the map in viridis, as opaque as `alpha` (0 to 1) says.

    The map's least value is dark blue and its greatest yellow. It is enlarged bilinearly, which never exceeds the
    values between which it interpolates.
    """
    pixels = explanation.inferred.pixels
    height, width, _ = pixels.shape
    heat = Image.fromarray(explanation.map.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    mixed = (1 - alpha) * pixels + alpha * VIRIDIS[(255 * _scaled(np.asarray(heat))).round().astype(np.uint8)]
    buffer = BytesIO()
    Image.fromarray(mixed.round().astype(np.uint8)).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _explained(result: InferenceResult, image: ImageResult, class_id: int | None) -> Explanation:
    assert result.head is not None  # noqa: S101  it comes with stage maps
    logits, _, stages = image.outputs
    chosen = int(logits.argmax()) if class_id is None else class_id
    weight, bias = result.head
    heat: Floats = np.tensordot(weight[chosen], stages[-1], axes=1)
    return Explanation(
        inferred=image,
        class_id=chosen,
        label=result.card.labels[chosen],
        score=float(softmax(logits)[chosen]),
        logit=float(logits[chosen]),
        bias=float(bias[chosen]),
        map=heat,
    )


def _scaled(heat: Floats) -> Floats:
    least, most = heat.min(), heat.max()
    scaled: Floats = (heat - least) / max(most - least, np.float32(1e-12))
    return scaled
