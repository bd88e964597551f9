"""Model cards: the file beside a model's weights that says how to use them.

Cards without `format` have format 1, which rounds `crop` to the nearest pixel; in 2, `preprocessing` says how to round;
in 3 it has more ways to resize and the order of the colours, a model may have no head, and its answers need not be a
plain softmax. A card is written in the lowest format that says the same, which older releases can read. A field without
which older releases would give wrong results raises the format, so that they refuse the card. They ignore any other
field that they do not know, with a warning.
"""

import json
from dataclasses import fields
from functools import cache
from math import floor
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import CardInvalid, reasons
from service.files import read_small
from service.images.geometry import Geometry, Interpolation, Kernel, Resize, Rounding

log = structlog.get_logger(component="store")

CARD_FILE = "card.json"
FORMAT = 3
MAX_BYTES = 16_000_000  # the names of 21,000 classes take one
MAX_NAME = 100  # characters of an unknown field, in a message

MULTI_LABEL = 0.5  # the threshold of multi-label models, as metrics and training scripts have it

Activation = Literal["softmax", "sigmoid", "none"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Mean = Annotated[float, Field(ge=0)]
_Std = Annotated[float, Field(gt=0)]
_Side = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
_Level = Annotated[int, Field(ge=0, le=255)]
Colours = Literal["rgb", "bgr"]


class Record(BaseModel):
    """Base of what is stored as JSON: immutable, and without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Preprocessing(Record):
    """How pixels become the model's input, as in `Geometry`.

    `colours` is the order of the model's channels. `mean` and `std` are those of its channels, in that order, scaled to
    0..1. `fill` is the colour around a letterbox in levels of 255: red, green, blue.
    """

    height: Annotated[int, Field(ge=32, le=4096)]
    width: Annotated[int, Field(ge=32, le=4096)]
    resize: Resize = "shorter_side_crop"
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    rounding: Rounding = "floor"
    interpolation: Interpolation = "bicubic"
    kernel: Kernel = "torchvision"
    antialias: bool = True
    fill: tuple[_Level, _Level, _Level] | None = None
    colours: Colours = "rgb"
    mean: tuple[_Mean, _Mean, _Mean] = (0.485, 0.456, 0.406)
    std: tuple[_Std, _Std, _Std] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.resize != "shorter_side_crop" and self.crop != 1:
            raise ValueError(f"a {self.resize} has no crop, but crop is {self.crop}; leave one of the two out")
        if (self.resize == "letterbox") != (self.fill is not None):
            raise ValueError(
                f"fill is the colour around a letterbox, and resize is {self.resize}; leave fill out"
                if self.fill
                else "a letterbox needs fill, the colour around the image in levels: 114 114 114 is Ultralytics', "
                "0 0 0 albumentations'"
            )
        if self.kernel == "opencv" and self.antialias:
            raise ValueError("OpenCV does not antialias; say antialias false (only its interpolation area averages)")
        if self.kernel == "torchvision" and not self.antialias and self.interpolation in {"lanczos", "area"}:
            raise ValueError(
                f"torchvision has no {self.interpolation} without antialiasing; say antialias true for Pillow's, or "
                f"kernel opencv for OpenCV's"
            )
        if max(*self.mean, *self.std) > 1:
            raise ValueError(
                f"mean {self.mean} and std {self.std} must be of pixels scaled to 0..1; divide those of 0..255 by 255, "
                "or import the checkpoint again"
            )
        return self

    @property
    def geometry(self) -> Geometry:
        """The part of it that `service.images.decoding` needs."""
        names = (field.name for field in fields(Geometry))
        return Geometry(**{name: value for name in names if (value := getattr(self, name)) is not None})

    @property
    def extended(self) -> set[str]:
        """The fields that say what no card before format 3 can."""
        plain: dict[str, set[object]] = {
            "resize": {"shorter_side_crop", "stretch"}, "interpolation": {"bilinear", "bicubic"},
            "kernel": {"torchvision"}, "antialias": {True}, "fill": {None}, "colours": {"rgb"},
        }  # fmt: skip
        return {name for name, values in plain.items() if getattr(self, name) not in values}


class WeightsFile(Record):
    """The file beside the card that holds the weights."""

    file: Annotated[str, Field(pattern=r"^[\w.-]+\.(safetensors|pth)$")]
    sha256: Sha256
    bytes: Annotated[int, Field(gt=0)]


class ReferenceFile(Record):
    """The file beside the card with reference images and float32's outputs: see `service.execution.reference`."""

    file: Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]
    sha256: Sha256


class Accuracy(Record):
    """A measured top-1 accuracy: the share of `images` of `dataset` that were classified correctly."""

    dataset: str
    top1: Annotated[float, Field(ge=0, le=1)]
    images: Annotated[int, Field(gt=0)]


class Origin(Record):
    """Where a pulled model's weights were fetched, and who gave the SHA-256 that they were checked against.

    With `nobody` the first file was trusted, and later ones must have the same digest.
    """

    url: str
    sha256: Sha256
    bytes: Annotated[int, Field(gt=0)]
    digest_from: Literal["publisher", "hub", "nobody"]
    revision: str | None = None


class Answers(Record):
    """How a model's logits become scores, and scores an answer.

    Scores are the activation of logits / `temperature`: shares of all classes (`softmax`), of each class by itself
    (`sigmoid`, of a multi-label model or of a single logit), or the logits themselves (`none`). An answer has the
    classes whose score is at least their threshold, one for all classes or one for each: by default MULTI_LABEL with
    `sigmoid`, and none with the others. Where the best score is below `unknown_below`, the image shows none of them.
    """

    activation: Activation = "softmax"
    temperature: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    thresholds: float | tuple[float, ...] | None = None
    unknown_below: float | None = None

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if self.activation == "none":
            if self.temperature != 1:
                raise ValueError("activation none answers with the logits as they are, so there is no temperature")
            return self
        given = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        for name, values in {"thresholds": given, "unknown_below": (self.unknown_below,)}.items():
            if wrong := [value for value in values if value is not None and not 0 <= value <= 1]:
                raise ValueError(f"{name} {wrong[0]:g}: scores of a {self.activation} are from 0 to 1")
        return self

    @property
    def least_scores(self) -> float | tuple[float, ...] | None:
        """The scores that classes must have to be in an answer: one for all, or one for each; None: none is needed."""
        if self.thresholds is None and self.activation == "sigmoid":
            return MULTI_LABEL
        return self.thresholds


class ModelCard(Answers):
    """A model's own metadata. `labels[i]` is the name of class i; without labels the model has no head.

    `explain_size` is the input's height and width where maps are explained and the request names no size: a model that
    was trained at several sizes gives finer maps at a larger one. None: as in `preprocessing`.
    """

    format: Annotated[int, Field(ge=1, le=FORMAT)] = FORMAT
    id: str
    variant: str
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing
    weights: WeightsFile
    parameters: Annotated[int, Field(gt=0)]
    licence: str
    source: str
    reference: ReferenceFile | None = None
    accuracy: Accuracy | None = None
    training: str | None = None
    explain_size: tuple[_Side, _Side] | None = None
    origin: Origin | None = None

    @model_validator(mode="after")
    def _thresholds_of_classes(self) -> Self:
        if not self.labels and (given := sorted(Answers.model_fields.keys() & self.model_dump(exclude_defaults=True))):
            raise ValueError(f"a model without a head has no {given[0]}, since it has no scores")
        if isinstance(self.thresholds, tuple) and len(self.thresholds) != len(self.labels):
            raise ValueError(f"{len(self.thresholds)} thresholds for {len(self.labels)} classes; give one for each")
        return self


class WithCard:
    """Base of what has a model's card, or the failure that is the reason why there is none."""

    __slots__ = ()
    id: str
    card: ModelCard | None
    failure: BaseException | None

    @property
    def variant(self) -> str:
        """The architecture's name, from the model's id."""
        return self.id.partition(".")[0]

    def require_card(self) -> ModelCard:
        """The card; raises the model's failure when there is none."""
        if self.card is None:
            raise self.failure or CardInvalid(f"{self.id} has no card")
        return self.card


def lowest_format(card: ModelCard) -> tuple[int, str]:
    """The earliest format that can say what `card` says, and for format 3 the fields that need it."""
    pixels = card.preprocessing
    needed = [f"preprocessing.{name}" for name in sorted(pixels.extended)]
    needed += [name for name, value in Answers() if getattr(card, name) != value]
    needed += [] if card.labels else ["no labels, which means no head"]
    if needed:
        return 3, ", ".join(needed)
    return (1 if pixels.resize == "shorter_side_crop" and pixels.crop == 1 else 2), ""  # 1: nothing is to be rounded


def card_json(card: ModelCard) -> str:
    """The text of a card's file, in the earliest format that says the same."""
    content = card.model_dump(mode="json", exclude_none=True)
    content["format"], _ = lowest_format(card)
    pixels, defaults = content["preprocessing"], Answers().model_dump()
    for name in [name for name, value in defaults.items() if getattr(card, name) == value]:
        content.pop(name, None)
    if not card.labels:
        del content["labels"]
    if content["format"] < FORMAT:
        for name in ("kernel", "antialias", "colours"):
            del pixels[name]
    if content["format"] == 1:
        del content["format"], pixels["resize"], pixels["rounding"]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_card(folder: Path) -> ModelCard:
    """The card in `folder`; one of an older format is converted to today's, and keeps its meaning.

    Raises:
        CardInvalid: it is missing, can't be read, is no JSON, of a newer format, or a field is wrong; each is named.
    """
    path = folder / CARD_FILE
    try:
        content = json.loads(read_small(path, MAX_BYTES, "card"))
    except OSError as error:
        raise CardInvalid(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CardInvalid(f"{path}: Invalid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CardInvalid(f"{path}: no card, but JSON of another kind; a card is an object")
    version = content.get("format", 1)
    if isinstance(version, int) and version > FORMAT:
        raise CardInvalid(
            f"{path}: the card has format {version}, and this release reads up to {FORMAT}; serve it with a newer "
            "release, or keep an older version of the model beside it"
        )
    try:
        card = _validated(path, _converted(path, content))
    except ValidationError as error:
        raise CardInvalid(f"{path}: {reasons(error)}") from error
    lowest, needed = lowest_format(card)
    if version < lowest == FORMAT:
        raise CardInvalid(
            f'{path}: {needed}: cards before format {lowest} have no such meaning; write "format": {lowest}'
        )
    if len(card.labels) == 1 and card.activation == "softmax":
        hint = 'write "activation": "sigmoid" into it, and "format": 3'
        _warn_once("card_of_one_class", path, "a softmax over one logit is always 1.0", hint)
    return card


def _validated(path: Path, content: dict[str, Any]) -> ModelCard:
    """The card with this content, without the fields that are unknown, which are logged."""
    try:
        return ModelCard.model_validate(content)
    except ValidationError as error:
        card = ModelCard.model_validate(content, extra="ignore")
        places = [".".join(map(str, each["loc"])) for each in error.errors()]
        unknown = ", ".join(place[:MAX_NAME] for place in sorted(places))
        _warn_once("card_fields_ignored", path, unknown, "a newer release may have written them")
        return card


def _converted(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content of a card in today's format; format 1 rounded the resized side to the nearest pixel."""
    pixels, version = content.get("preprocessing"), content.get("format", 1)
    if version not in range(1, FORMAT):
        return content
    content = {**content, "format": FORMAT}
    if version != 1 or not isinstance(pixels, dict) or (crop := pixels.get("crop", 1)) == 1:
        return content
    height = pixels.get("height")
    if isinstance(crop, float) and 0 < crop < 1 and isinstance(height, int) and height > 0:
        was, now = round(height / crop), floor(height / crop)
        if was != now:
            _warn_once(
                "card_of_older_format",
                path,
                f"crop {crop} of {height} goes on meaning a resize to {was} pixels, as when it was imported",
                f"timm and torchvision resize to {now}; pull with --again, or import again, for that",
            )
    return {**content, "preprocessing": {"rounding": "nearest", **pixels}}


@cache
def _warn_once(event: str, card: Path, what: str, hint: str) -> None:
    """Once, since cards are read whenever the store is."""
    log.warning(event, card=str(card), what=what, hint=hint)
