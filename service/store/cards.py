"""Model cards: what lies beside a model's weights and says how to use them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import CardInvalid
from service.images.geometry import Geometry
from service.invalid import reasons

CARD_FILE = "card.json"
MAX_BYTES = 16_000_000  # the names of 21,000 classes take one

Triple = tuple[float, float, float]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Preprocessing(_Record):
    """How pixels become the model's input.

    `crop` is the share of the shorter side that the centre crop keeps; `mean` and `std` are per RGB channel, in units
    of a pixel scaled to 0..1.
    """

    height: Annotated[int, Field(ge=32, le=4096)]
    width: Annotated[int, Field(ge=32, le=4096)]
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: Triple = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (
        0.229,
        0.224,
        0.225,
    )

    @property
    def geometry(self) -> Geometry:
        """The part of it that concerns `service.images.decoding`."""
        return Geometry(self.height, self.width, self.crop, self.interpolation)


class WeightsFile(_Record):
    """The file beside the card that holds the weights."""

    file: Annotated[str, Field(pattern=r"^[\w.-]+\.(safetensors|pth)$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(gt=0)]


class ReferenceFile(_Record):
    """The file beside the card with reference images and their float32 logits: see `service.execution.reference`."""

    file: Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Accuracy(_Record):
    """A measured top-1 accuracy: share of `images` of `dataset` that were right."""

    dataset: str
    top1: Annotated[float, Field(ge=0, le=1)]
    images: Annotated[int, Field(gt=0)]


class Origin(_Record):
    """Where a pulled model's weights were fetched, and what their bytes there were held against.

    `digest_from` is who gave the SHA-256: whoever published the weights, or the hub that they came from. With `nobody`
    the first file fetched was trusted, and its digest is what a later one is held against.
    """

    url: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(gt=0)]
    digest_from: Literal["publisher", "hub", "nobody"]
    revision: str | None = None


class ModelCard(_Record):
    """A model's own metadata. `labels[i]` is the name of class i."""

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


def read_card(folder: Path) -> ModelCard:
    """The card in `folder`.

    Raises:
        CardInvalid: it is missing, is no JSON, or a field is wrong; each wrong field is named.
    """
    path = folder / CARD_FILE
    if path.exists() and not path.is_file():
        raise CardInvalid(f"{path}: no regular file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CardInvalid(f"{path}: larger than {MAX_BYTES} bytes, which no card is")
        return ModelCard.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CardInvalid(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise CardInvalid(f"{path}: {reasons(error)}") from error
