"""How well a model of the store does on labelled images, and whether other preprocessing would do better."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from pydantic import ValidationError

from service.engine import Engine
from service.errors import InvalidRequest, ServiceError
from service.images.decoding import decode
from service.images.geometry import Geometry, Interpolation, Resize
from service.labelled.folder import LabelledFolder, Mapped, Skipped, map_labels, shown
from service.labelled.measures import Confusion, mcnemar
from service.labelled.running import infer_many, read_image
from service.results import Image, ImageResult
from service.store.cards import Preprocessing
from service.store.store import StoredModel

CROPS = 0.875, 0.9, 1.0  # the authors' release, timm, and none
ALPHA = 0.01  # the chance of calling any of all alternatives better that is as good as the card's
FILLS = (114, 114, 114), (0, 0, 0)  # Ultralytics', albumentations'
# Other ways to compute the same crop. OpenCV never antialiases.
_COMPUTED: Sequence[Mapping[str, Any]] = (
    *({"interpolation": each} for each in get_args(Interpolation)),
    {"kernel": "torchvision", "antialias": True},
    {"kernel": "torchvision", "antialias": False},
    {"kernel": "opencv", "antialias": False},
)

Step = Callable[[str, int], None]
"""Reports progress: what is done, and how many images that takes in all, before the first; then 0 for each image."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """Other preprocessing on the sample: `right` of `images`, of which `only_there` were wrong as the card has it.

    `only_card` were right only as the card has it. `chance` is the probability of such a difference between two that
    are equally good, times the number of alternatives (Bonferroni's bound).
    """

    preprocessing: Preprocessing
    changes: Mapping[str, Any]
    images: int
    right: int
    card_right: int
    only_there: int
    only_card: int
    chance: float = 1.0

    @property
    def better(self) -> bool:
        """Whether it is, beyond chance."""
        return self.only_there > self.only_card and self.chance < ALPHA


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found; `alternatives` are other preprocessings, the best first."""

    stored: StoredModel
    mapped: Mapped
    confusion: Confusion
    skipped: Sequence[Skipped]
    alternatives: Sequence[Alternative]


class _Answered(NamedTuple):
    path: Path
    truth: int
    answer: int


async def check(engine: Engine, name: str, folder: LabelledFolder, *, sample: int, seed: int, step: Step) -> Checked:
    """The accuracy of the model called `name` on the images of `folder`, and that of alternatives on `sample` of them.

    Raises:
        InvalidRequest: no sub-folder stands for a label, or no image of one can be read.
        ServiceError: what `Engine.infer` raises of models.
    """
    await engine.load(name)
    stored = (await engine.model(name)).stored
    card = stored.require_card()
    mapped = map_labels(list(folder.classes), card.labels)
    skipped = list(folder.skipped)
    items = [(path, i) for sub_folder, i in mapped.ids.items() for path in folder.classes[sub_folder]]
    step(stored.key, len(items))
    answered: list[_Answered] = []
    limit = engine.options.max_body_bytes
    async for (path, truth), result in infer_many(engine, stored.key, items, lambda item: read_image(item[0], limit)):
        step("", 0)
        if isinstance(result, ServiceError):
            skipped.append(Skipped(shown(path), str(result)))
        else:
            answered.append(_Answered(path, truth, _top(result)))
    if not answered:
        why = f"; {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        raise InvalidRequest(f"{folder.root}: no image of a folder that stands for a label can be read{why}")
    confusion = Confusion.of(card.labels, [each.truth for each in answered], [each.answer for each in answered])
    chosen = _sampled(answered, sample, seed)
    return Checked(
        stored, mapped, confusion, skipped, await _Trial(engine, stored, chosen, step).run() if chosen else []
    )


def _top(result: ImageResult) -> int:
    return int(result.outputs.logits.argmax())


def _sampled(answered: Sequence[_Answered], count: int, seed: int) -> list[_Answered]:
    """`count` of them, of each class its share, as far as there are so many."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(answered))
    ranks: dict[int, int] = {}
    totals = np.bincount([each.truth for each in answered])
    places = []
    for i in order.tolist():
        truth = answered[i].truth
        rank = ranks[truth] = ranks.get(truth, 0) + 1
        places.append((rank / totals[truth], i))
    return [answered[i] for _, i in sorted(places)[:count]]


@dataclass(frozen=True, slots=True)
class _Trial:
    """Runs a sample of images, brought to the model's input in other ways."""

    engine: Engine
    stored: StoredModel
    sample: Sequence[_Answered]
    step: Step

    async def run(self) -> list[Alternative]:
        """First each `resize` and crop, then with the best of them each other field."""
        own = self.stored.require_card().preprocessing
        tried = [await self._try(own, pixels) for pixels in _resizes(own)]
        best = max(tried, key=lambda each: each.only_there - each.only_card, default=None)
        base = best.preprocessing if best and _chance(best, len(tried)) < ALPHA and _gains(best) else own
        tried += [await self._try(own, pixels) for pixels in _others(base) if pixels != own]
        judged = [_judged(each, len(tried)) for each in tried]
        return sorted(judged, key=lambda each: each.only_card - each.only_there)

    async def _try(self, own: Preprocessing, pixels: Preprocessing) -> Alternative:
        changes = {field: value for field, value in pixels.model_dump().items() if value != getattr(own, field)}
        self.step(", ".join(f"{field} {value}" for field, value in changes.items()), len(self.sample))
        options, both = self.engine.options, [0, 0, 0, 0]  # (neither, only there, only as the card, both) are right
        read = partial(
            _decoded, pixels.geometry, options.max_body_bytes, options.max_image_pixels, scaled=options.scaled_jpeg
        )
        async for each, result in infer_many(self.engine, self.stored.key, self.sample, read):
            self.step("", 0)
            if isinstance(result, ImageResult):
                both[(_top(result) == each.truth) + 2 * (each.answer == each.truth)] += 1
        _, only_there, only_card, right = both
        return Alternative(pixels, changes, sum(both), right + only_there, right + only_card, only_there, only_card)


def _decoded(geometry: Geometry, max_bytes: int, max_pixels: int, item: _Answered, *, scaled: bool) -> Image:
    data = read_image(item.path, max_bytes)
    if isinstance(data, ServiceError):
        return data
    try:
        return decode(data, geometry, max_pixels=max_pixels, scaled_jpeg=scaled).pixels
    except ServiceError as error:
        return error


def _gains(each: Alternative) -> bool:
    return each.only_there > each.only_card


def _chance(each: Alternative, alternatives: int) -> float:
    return min(1.0, alternatives * mcnemar(each.only_there, each.only_card))


def _judged(each: Alternative, alternatives: int) -> Alternative:
    return replace(each, chance=_chance(each, alternatives))


def _resizes(own: Preprocessing) -> list[Preprocessing]:
    """Every other `resize` that a card can say, where it has a crop with each of `CROPS`, where a colour with each."""
    return _distinct(own, [
        {"resize": resize, "crop": crop, "fill": fill}
        for resize, crop in product(get_args(Resize), CROPS)
        for fill in (FILLS if resize == "letterbox" else (None,))
    ])  # fmt: skip


def _others(base: Preprocessing) -> list[Preprocessing]:
    """`base` with each other way to compute its pixels."""
    return _distinct(base, _COMPUTED)


def _distinct(base: Preprocessing, changes: Sequence[Mapping[str, Any]]) -> list[Preprocessing]:
    """`base` with each of `changes` that is possible, once."""
    found: list[Preprocessing] = []
    for change in changes:
        try:
            pixels = Preprocessing.model_validate({**base.model_dump(), **change})
        except ValidationError:  # such as a stretch with a crop
            continue
        if pixels != base and pixels.geometry not in [each.geometry for each in found]:
            found.append(pixels)
    return found
