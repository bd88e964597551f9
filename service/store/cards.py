"""Model cards: the file beside a model's weights that says how to use them.

`format` is the version of the form. 1, of cards without `format`: `crop` is rounded to the nearest pixel.
2: `preprocessing` says how to round, and may say `stretch`.

A card that needs nothing new of a format is written in the previous one, which older releases can read. A release that
adds a field raises the format if older releases would give wrong results without the field: they refuse such a card.
They ignore any other field that they do not know, with a warning.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import CardInvalid, reasons
from service.images.geometry import Geometry, Interpolation, Resize, Rounding

log = structlog.get_logger(component="store")

CARD_FILE = "card.json"
FORMAT = 2
MAX_BYTES = 16_000_000  # the names of 21,000 classes take one
MAX_NAME = 100  # characters of an unknown field, in a message

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Mean = Annotated[float, Field(ge=0)]
_Std = Annotated[float, Field(gt=0)]


class Record(BaseModel):
    """Base of what is stored as JSON: immutable, and without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Preprocessing(Record):
    """How pixels become the model's input.

    `resize`, `crop` and `rounding` are those of `service.images.geometry.Geometry`; `mean` and `std` are per RGB
    channel, in units of a pixel scaled to 0..1.
    """

    height: Annotated[int, Field(ge=32, le=4096)]
    width: Annotated[int, Field(ge=32, le=4096)]
    resize: Resize = "shorter_side_crop"
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    rounding: Rounding = "floor"
    interpolation: Interpolation = "bicubic"
    mean: tuple[_Mean, _Mean, _Mean] = (0.485, 0.456, 0.406)
    std: tuple[_Std, _Std, _Std] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.resize == "stretch" and self.crop != 1:
            raise ValueError(f"a stretch has no crop, but crop is {self.crop}; leave one of the two out")
        if max(*self.mean, *self.std) > 1:
            raise ValueError(
                f"mean {self.mean} and std {self.std} must be of pixels scaled to 0..1; divide those of 0..255 by 255, "
                "or import the checkpoint again"
            )
        return self

    @property
    def geometry(self) -> Geometry:
        """The part of it that `service.images.decoding` needs."""
        return Geometry(self.height, self.width, self.crop, self.interpolation, self.resize, self.rounding)


class WeightsFile(Record):
    """The file beside the card that holds the weights."""

    file: Annotated[str, Field(pattern=r"^[\w.-]+\.(safetensors|pth)$")]
    sha256: Sha256
    bytes: Annotated[int, Field(gt=0)]


class ReferenceFile(Record):
    """The file beside the card with reference images and their float32 logits: see `service.execution.reference`."""

    file: Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]
    sha256: Sha256


class Accuracy(Record):
    """A measured top-1 accuracy: the share of `images` of `dataset` that were classified correctly."""

    dataset: str
    top1: Annotated[float, Field(ge=0, le=1)]
    images: Annotated[int, Field(gt=0)]


class Origin(Record):
    """Where a pulled model's weights were fetched, and what their bytes were checked against.

    `digest_from` is who gave the SHA-256: the publisher of the weights, or the hub that serves them. With `nobody` the
    first file was trusted, and later ones must have the same digest.
    """

    url: str
    sha256: Sha256
    bytes: Annotated[int, Field(gt=0)]
    digest_from: Literal["publisher", "hub", "nobody"]
    revision: str | None = None


class ModelCard(Record):
    """A model's own metadata. `labels[i]` is the name of class i."""

    format: Annotated[int, Field(ge=1, le=FORMAT)] = FORMAT
    id: str
    variant: str
    labels: Annotated[tuple[str, ...], Field(min_length=1)]
    preprocessing: Preprocessing
    weights: WeightsFile
    parameters: Annotated[int, Field(gt=0)]
    licence: str
    source: str
    reference: ReferenceFile | None = None
    accuracy: Accuracy | None = None
    training: str | None = None
    origin: Origin | None = None


def card_json(card: ModelCard) -> str:
    """The text of a card's file."""
    content = card.model_dump(mode="json", exclude_none=True)
    if card.preprocessing.resize == "shorter_side_crop" and card.preprocessing.crop == 1:  # nothing to be rounded
        del content["format"], content["preprocessing"]["resize"], content["preprocessing"]["rounding"]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_card(folder: Path) -> ModelCard:
    """The card in `folder`; one of an older format is converted to today's, and keeps its meaning.

    Raises:
        CardInvalid: it is missing, can't be read, is no JSON, of a newer format, or a field is wrong; each is named.
    """
    path = folder / CARD_FILE
    try:
        if path.exists() and not path.is_file():
            raise CardInvalid(f"{path}: no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise CardInvalid(f"{path}: larger than {MAX_BYTES} bytes, which no card is")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CardInvalid(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CardInvalid(f"{path}: Invalid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CardInvalid(f"{path}: no card, but JSON of another kind; a card is an object")
    _check_format(path, content)
    try:
        card = ModelCard.model_validate(_converted(path, content), extra="ignore")
    except ValidationError as error:
        raise CardInvalid(f"{path}: {reasons(error)}") from error
    if unknown := sorted(_unknown(content, ModelCard)):
        _warn_once("card_fields_ignored", str(path), ", ".join(unknown), "a newer release may have written them")
    if len(card.labels) == 1:
        _warn_once(
            "card_of_one_class", str(path), "a softmax over one logit is always 1.0", "import it with two classes"
        )
    return card


def _check_format(path: Path, content: dict[str, Any]) -> None:
    version = content.get("format", 1)
    if isinstance(version, int) and version > FORMAT:
        raise CardInvalid(
            f"{path}: the card has format {version}, and this release reads up to {FORMAT}; serve it with a newer "
            "release, or keep an older version of the model beside it"
        )


def _converted(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content of a card in format 2; format 1 rounded the resized side to the nearest pixel."""
    pixels = content.get("preprocessing")
    if content.get("format", 1) != 1 or not isinstance(pixels, dict):
        return content
    if pixels.get("crop", 1) == 1:
        return {**content, "format": FORMAT}
    then: Rounding = "nearest"
    crop, height = pixels.get("crop", 1.0), pixels.get("height")
    if isinstance(crop, float) and 0 < crop < 1 and isinstance(height, int) and height > 0:
        was, now = (Geometry(height, height, crop, "bicubic", rounding=r).resized(height) for r in (then, "floor"))
        if was != now:
            _warn_once(
                "card_of_older_format",
                str(path),
                f"crop {crop} of {height} goes on meaning a resize to {was} pixels, as when it was imported",
                f"timm and torchvision resize to {now}; pull with --again, or import again, for that",
            )
    return {**content, "format": FORMAT, "preprocessing": {"rounding": then, **pixels}}


def _unknown(content: object, model: type[BaseModel], where: str = "") -> Iterator[str]:
    """The places of all fields that neither `model` nor a record inside it has."""
    if not isinstance(content, dict):
        return
    for name, value in content.items():
        field = model.model_fields.get(name)
        if field is None:
            yield where + str(name)[:MAX_NAME]
            continue
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _unknown(value, inner, f"{where}{name}.")


@cache
def _warn_once(event: str, card: str, what: str, hint: str) -> None:
    """Once, since cards are read whenever the store is."""
    log.warning(event, card=card, what=what, hint=hint)
