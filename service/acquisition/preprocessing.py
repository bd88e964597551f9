"""What each library does to an image before its models see it, as cards say it, and what people say of their own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, isfinite, nextafter
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.acquisition.catalogue import SIDE
from service.architecture.variants import Dialect
from service.errors import InvalidRequest
from service.images.geometry import Interpolation, Resize
from service.invalid import reasons
from service.store.cards import Preprocessing

MAX_PREPROCESSOR_BYTES = 1_000_000
INTERPOLATIONS: Mapping[int, Interpolation] = MappingProxyType({2: "bilinear", 3: "bicubic"})  # by Pillow's numbers
_LEVELS = 255
_SAME_FACTOR = 1e-3

Triple = tuple[float, float, float]

# timm: `create_transform(**resolve_model_data_config(model))` of its PVT-v2 models. The authors' release:
# `build_transform` of its `classification/datasets.py`. transformers: the defaults of `PvtImageProcessor`. lucid: the
# `ImageClassification` of its weights, of which its converter rounds `resize_size` to the nearest.
PRESETS: Mapping[Dialect, Preprocessing] = MappingProxyType(
    {
        "timm": Preprocessing(height=SIDE, width=SIDE, crop=0.9),
        "official": Preprocessing(height=SIDE, width=SIDE, crop=0.875),
        "transformers": Preprocessing(height=SIDE, width=SIDE, resize="stretch"),
        "lucid": Preprocessing(height=SIDE, width=SIDE, crop=0.9, rounding="nearest"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What is said of a checkpoint's preprocessing; None: as its library does. `mean` and `std` are in either scale."""

    height: int | None = None
    width: int | None = None
    resize: Resize | None = None
    crop: float | None = None
    shorter_side: int | None = None
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    std: Triple | None = None


def preprocessing(given: Given, preset: Preprocessing) -> Preprocessing:
    """`preset`, but for what is `given`.

    Raises:
        InvalidRequest: the two do not go together, or are no preprocessing; the message says what.
    """
    known = {
        name: value
        for name in ("height", "width", "resize", "interpolation")
        if (value := getattr(given, name)) is not None
    }
    mean, std = _unit_scale(given.mean or preset.mean, given.std or preset.std)
    crop = _crop(given, known.get("height", preset.height), known.get("width", preset.width))
    resize = "shorter_side_crop" if crop is not None else preset.resize
    if crop is not None and given.resize == "stretch":
        raise InvalidRequest("a stretch takes the whole image, so there is no crop; leave one of the two out")
    fields = preset.model_dump() | {"resize": resize, "mean": mean, "std": std} | known
    if crop is not None:
        fields |= {"crop": crop, "rounding": "floor"}
    elif fields["resize"] == "stretch":
        fields |= {"crop": 1.0}
    try:
        return Preprocessing.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(reasons(error, "preprocessing")) from error


def described(pixels: Preprocessing) -> str:
    """In words, for people: what becomes of an image."""
    size, scale = f"{pixels.height}x{pixels.width}", f"mean {_shown(pixels.mean)}, std {_shown(pixels.std)}"
    if pixels.resize == "stretch":
        return f"stretched to {size}, {pixels.interpolation}, {scale}"
    down, across = (pixels.geometry.resized(side) for side in (pixels.height, pixels.width))
    covered = f"shorter side to {down}" if down == across else f"resized to cover {down}x{across}"
    return f"{covered}, {pixels.interpolation}, centre crop {size}, {scale}"


def _crop(given: Given, height: int, width: int) -> float | None:
    """The share of the resized shorter side that is kept, as given itself or by what the image is resized to."""
    if given.shorter_side is None:
        return given.crop
    if given.crop is not None:
        raise InvalidRequest("the shorter side in pixels and a crop say the same thing; leave one of the two out")
    if height != width or given.shorter_side < height:
        raise InvalidRequest(
            f"shorter side {given.shorter_side}: it is for square input, and of at least its {height} pixels; "
            "give a crop instead"
        )
    crop = height / given.shorter_side
    while floor(height / crop) < given.shorter_side:  # the quotient of doubles may fall just short
        crop = nextafter(crop, 0)
    return crop


def _unit_scale(mean: Triple, std: Triple) -> tuple[Triple, Triple]:
    """Both in units of a pixel scaled to 0..1, of which those of 0..255 are converted.

    Zeros fit either scale, and so does a `std` of ones: beside a `mean` of 0..255 it means no scaling, as Caffe has it.

    Raises:
        InvalidRequest: they are of two scales, or of neither; the message says which.
    """
    of_mean, of_std = _scale("mean", mean), _scale("std", std)
    if of_mean == _LEVELS and set(std) == {1.0}:
        of_std = _LEVELS
    if not any(mean):
        of_mean = of_std
    if of_mean != of_std:
        shown = f"mean {_shown(mean)} is of pixels from 0 to {of_mean}, std {_shown(std)} of pixels from 0 to {of_std}"
        raise InvalidRequest(f"{shown}; give both in one scale, such as 0.485 0.456 0.406 and 0.229 0.224 0.225")
    if of_mean == 1:
        return mean, std
    return _divided(mean), _divided(std)


def _divided(values: Triple) -> Triple:
    red, green, blue = values
    return red / _LEVELS, green / _LEVELS, blue / _LEVELS


def _scale(name: str, values: Triple) -> int:
    """The greatest value that a pixel has in the scale of `values`."""
    if not all(map(isfinite, values)) or max(values) > _LEVELS:
        raise InvalidRequest(f"{name} {_shown(values)}: each must be a number, of pixels from 0 to 1 or from 0 to 255")
    if max(values) <= 1:
        return 1
    if any(0 < value < 1 for value in values):
        raise InvalidRequest(f"{name} {_shown(values)}: some are of pixels from 0 to 1, some from 0 to 255; use one")
    return 255


def _shown(values: Triple) -> str:
    return " ".join(f"{value:g}" for value in values)


class _Size(BaseModel):
    model_config = ConfigDict(extra="ignore")

    height: int | None = None
    width: int | None = None


class _Processor(BaseModel):
    """What an image processor of transformers is made from; what it does not say is as in `PvtImageProcessor`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    do_resize: bool = True
    size: _Size | Annotated[int, Field(gt=0)] = _Size(height=SIDE, width=SIDE)
    resample: Literal[2, 3] = 3
    do_center_crop: bool | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / _LEVELS
    do_normalize: bool = True
    image_mean: Triple = (0.485, 0.456, 0.406)
    image_std: Triple = (0.229, 0.224, 0.225)


def of_transformers(path: Path, shown: str | None = None) -> Preprocessing:
    """What the image processor does that the file `path` is saved from; `shown` is what messages call it.

    Raises:
        InvalidRequest: it can't be read, or does what cards can't say.
    """
    name = shown or str(path)
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_PREPROCESSOR_BYTES))
        return _as_card(_Processor.model_validate(content))
    except OSError as error:
        raise InvalidRequest(f"{name}: {error.strerror or error}") from error
    except ValidationError as error:
        raise InvalidRequest(f"{name}: {reasons(error)}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name}: no JSON ({error})") from error
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error}") from error


def _as_card(said: _Processor) -> Preprocessing:
    if not said.do_resize:
        raise InvalidRequest("do_resize is false, and images come in any size; say how with --resize and --crop")
    sized = _sized(said)
    if said.do_rescale and abs(said.rescale_factor * _LEVELS - 1) > _SAME_FACTOR:
        raise InvalidRequest(f"rescale_factor {said.rescale_factor}: it must be 1/255; give --mean and --std")
    if not said.do_normalize:
        low, one = (0.0, 0.0, 0.0), 1.0 if said.do_rescale else 1 / _LEVELS
        return sized.model_copy(update={"mean": low, "std": (one, one, one)})
    scaled = (said.image_mean, said.image_std)
    mean, std = scaled if said.do_rescale else (_divided(said.image_mean), _divided(said.image_std))
    return Preprocessing.model_validate(sized.model_dump() | {"mean": mean, "std": std})


def _sized(said: _Processor) -> Preprocessing:
    """Only a stretch: where transformers crops, it begins half a pixel beside where torchvision and cards do."""
    size = said.size if isinstance(said.size, _Size) else _Size(height=said.size, width=said.size)
    if said.do_center_crop or not (size.height and size.width):
        raise InvalidRequest(
            "it does not resize to one height and width, but crops or keeps the aspect ratio, which is not read; "
            "import without this file, and say how with --size, --resize and --crop"
        )
    interpolation = INTERPOLATIONS[said.resample]
    return Preprocessing(height=size.height, width=size.width, resize="stretch", interpolation=interpolation)
