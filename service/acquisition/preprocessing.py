"""What each library does to an image before its models see it, as cards say it, and what people say of their own."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, isfinite, nextafter
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

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
    if height != width or not 0 < height <= given.shorter_side:
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
    return _divided(mean, _LEVELS), _divided(std, _LEVELS)


def _divided(values: Triple | float, by: float) -> Triple:
    """`values` / `by`, where one value is that of all channels."""
    red, green, blue = values if isinstance(values, tuple) else (values,) * 3
    return red / by, green / by, blue / by


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


_Side = Annotated[int, Field(gt=0)]
_EACH = "import without this file, and say how with --size, --resize, --crop, --mean and --std"
# What image processors of transformers do where their file does not say it. Others do more than resize and normalise,
# or mean something else by the same fields: ConvNeXT's crops, and a `size` of one number is CLIP's shortest edge.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Pvt": {"resample": 3, "image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)},
        "ViT": {"resample": 2, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)},
    }
)
_TYPE = re.compile(r"(?P<model>\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")


class _Processor(BaseModel):
    """What an image processor of transformers is made from, once `_DEFAULTS` has what its file does not say."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    do_resize: bool = True
    size: _Size | _Side | tuple[_Side, _Side] = _Size(height=SIDE, width=SIDE)
    resample: Literal[2, 3]
    do_center_crop: bool = False
    do_rescale: bool = True
    rescale_factor: Annotated[float, Field(gt=0)] = 1 / _LEVELS
    do_normalize: bool = True
    image_mean: Triple | float
    image_std: Triple | float


def of_transformers(path: Path, shown: str | None = None) -> Preprocessing:
    """What the image processor does that the file `path` is saved from; `shown` is what messages call it.

    Raises:
        InvalidRequest: it can't be read, or does what cards can't say.
    """
    name = shown or str(path)
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_PREPROCESSOR_BYTES))
        return _as_card(_Processor.model_validate(_whole(content)))
    except OSError as error:
        raise InvalidRequest(f"{name}: {error.strerror or error}") from error
    except ValidationError as error:
        raise InvalidRequest(f"{name}: {reasons(error)}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name}: no JSON ({error})") from error
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error}") from error


def _whole(content: object) -> object:
    """What the file says, null being nothing said, and the rest as its image processor has it."""
    if not isinstance(content, dict):
        return content
    said = {field: value for field, value in content.items() if value is not None}
    kind = str(said.get("image_processor_type", said.get("feature_extractor_type", "PvtImageProcessor")))
    match = _TYPE.fullmatch(kind)
    if match is None or match["model"] not in _DEFAULTS:
        raise InvalidRequest(f"{kind[:100]} is another image processor than PVT's and is not read; {_EACH}")
    return {**_DEFAULTS[match["model"]], **said}


def _as_card(said: _Processor) -> Preprocessing:
    """The pixels p of 0..255 become (p * factor - mean) / std, for which cards have no factor but 1 / 255."""
    if not said.do_resize:
        raise InvalidRequest(f"do_resize is false, and images come in any size; {_EACH}")
    sized = _sized(said)
    mean, std = (said.image_mean, said.image_std) if said.do_normalize else (0.0, 1.0)
    scale = said.rescale_factor / (1 / _LEVELS) if said.do_rescale else _LEVELS
    return Preprocessing.model_validate(
        sized.model_dump() | {"mean": _divided(mean, scale), "std": _divided(std, scale)}
    )


def _sized(said: _Processor) -> Preprocessing:
    """Only a stretch: where transformers crops, it begins half a pixel beside where torchvision and cards do."""
    if isinstance(said.size, _Size):
        height, width = said.size.height, said.size.width
    else:
        height, width = said.size if isinstance(said.size, tuple) else (said.size, said.size)
    if said.do_center_crop or not (height and width):
        raise InvalidRequest(
            "it does not resize to one height and width, but crops or keeps the aspect ratio, which is not read; "
            f"{_EACH}"
        )
    interpolation = INTERPOLATIONS[said.resample]
    return Preprocessing(height=height, width=width, resize="stretch", interpolation=interpolation)
