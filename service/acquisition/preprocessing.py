"""Preprocessing for cards: that of each library, that of transformers' own file, and the options of an import."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import floor, isfinite, nextafter
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.acquisition.catalogue import SIDE
from service.architecture.variants import Dialect
from service.errors import InvalidRequest, reasons
from service.images.geometry import Interpolation, Kernel, Resize
from service.store.cards import Colours, Preprocessing

MAX_PREPROCESSOR_BYTES = 1_000_000
_LEVELS = 255
_BY_NUMBER: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "area")  # `Image.Resampling`

Triple = tuple[float, float, float]

# timm: `create_transform(**resolve_model_data_config(model))` of its PVT-v2 models. The authors' release:
# `build_transform` of its `classification/datasets.py`. transformers: the defaults of `PvtImageProcessor`. lucid: the
# `ImageClassification` of its weights, of which its converter rounds `resize_size` to the nearest.
PRESETS: Mapping[Dialect, Preprocessing] = MappingProxyType(
    {
        "timm": Preprocessing(height=SIDE, width=SIDE, crop=0.9),
        "official": Preprocessing(height=SIDE, width=SIDE, crop=0.875),
        "mmdetection": Preprocessing(height=SIDE, width=SIDE, crop=0.875),  # it trains from the authors' weights
        "transformers": Preprocessing(height=SIDE, width=SIDE, resize="stretch"),
        "lucid": Preprocessing(height=SIDE, width=SIDE, crop=0.9, rounding="nearest"),
    }
)
Like = Literal["torchvision", "timm", "transformers", "opencv"]
# torchvision: `torchvision.transforms._presets.ImageClassification`. OpenCV: `cv2.resize`, with the mean and std of
# ImageNet, as OpenCV has none, and RGB, as nearly all training code converts what `cv2.imread` reads.
LIKE: Mapping[Like, Preprocessing] = MappingProxyType(
    {
        "torchvision": Preprocessing(height=SIDE, width=SIDE, crop=0.875, interpolation="bilinear"),
        "timm": PRESETS["timm"],
        "transformers": PRESETS["transformers"],
        "opencv": Preprocessing(
            height=SIDE, width=SIDE, resize="stretch", interpolation="bilinear", kernel="opencv", antialias=False
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessingOptions:
    """What differs from the preprocessing of the library. `mean` and `std` are of pixels from 0 to 1 or 0 to 255."""

    height: int | None = None
    width: int | None = None
    resize: Resize | None = None
    crop: float | None = None
    shorter_side: int | None = None
    interpolation: Interpolation | None = None
    kernel: Kernel | None = None
    antialias: bool | None = None
    fill: tuple[int, int, int] | None = None
    colours: Colours | None = None
    mean: Triple | None = None
    std: Triple | None = None


def preprocessing(options: PreprocessingOptions, preset: Preprocessing) -> Preprocessing:
    """`preset`, changed by `options`.

    Raises:
        InvalidRequest: the two do not go together, or are no preprocessing; the message says what.
    """
    given = {name: value for name, value in asdict(options).items() if value is not None}
    fields = preset.model_dump() | given
    fields["mean"], fields["std"] = _unit_scale(fields["mean"], fields["std"])
    if (shorter_side := fields.pop("shorter_side", None)) is not None:
        if "crop" in given:
            raise InvalidRequest("the shorter side in pixels and a crop say the same thing; leave one of the two out")
        fields["crop"] = _crop(shorter_side, fields["height"], fields["width"])
    if {"crop", "shorter_side"} & given.keys():
        if options.resize not in {None, "shorter_side_crop"}:
            raise InvalidRequest(
                f"a {options.resize} has no crop beside the input's size; leave --resize {options.resize}, or else "
                "--crop and --shorter-side, out"
            )
        fields |= {"resize": "shorter_side_crop", "rounding": "floor"}
    elif fields["resize"] != "shorter_side_crop":
        fields["crop"] = 1.0
    if fields["resize"] == "letterbox" and fields["fill"] is None:
        raise InvalidRequest(
            "a letterbox has a colour around the image: give --fill 114 114 114, as Ultralytics, or --fill 0 0 0, as "
            "albumentations"
        )
    if fields["kernel"] == "opencv" and options.antialias is None:
        fields["antialias"] = False
    try:
        return Preprocessing.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(reasons(error, "preprocessing")) from error


def describe(pixels: Preprocessing) -> str:
    """The preprocessing in words."""
    size, scale = f"{pixels.height}x{pixels.width}", f"mean {_text(pixels.mean)}, std {_text(pixels.std)}"
    scale = f"channels in the order blue, green, red, {scale}" if pixels.colours == "bgr" else scale
    if pixels.resize == "none":
        return f"only images of {size}, {scale}"
    if pixels.resize == "center_crop":
        return f"not resized, centre crop {size}, on black where smaller, {scale}"
    plain = "" if pixels.antialias else " of torch without antialiasing"
    how = pixels.interpolation + (" of OpenCV" if pixels.kernel == "opencv" else plain)
    if pixels.resize == "stretch":
        return f"stretched to {size}, {how}, {scale}"
    if pixels.resize == "letterbox":
        return f"fitted into {size} on the colour {_text(pixels.fill or ())}, {how}, {scale}"
    down, across = (pixels.geometry.resized(side) for side in (pixels.height, pixels.width))
    covered = f"shorter side to {down}" if down == across else f"resized to cover {down}x{across}"
    return f"{covered}, {how}, centre crop {size}, {scale}"


def _crop(shorter_side: int, height: int, width: int) -> float:
    """The share of a shorter side in pixels that is kept."""
    if height != width or not 0 < height <= shorter_side:
        raise InvalidRequest(
            f"shorter side {shorter_side}: it is for square input, and of at least its {height} pixels; "
            "give a crop instead"
        )
    crop = height / shorter_side
    while floor(height / crop) < shorter_side:  # the quotient of doubles may fall just short
        crop = nextafter(crop, 0)
    return crop


def _unit_scale(mean: Triple, std: Triple) -> tuple[Triple, Triple]:
    """Both for pixels from 0 to 1; values for pixels from 0 to 255 are converted.

    Zeros fit both scales, and so does a `std` of ones: beside a `mean` of 0..255 it means no scaling, as in Caffe.
    """
    of_mean, of_std = _scale("mean", mean), _scale("std", std)
    if of_mean == _LEVELS and set(std) == {1.0}:
        of_std = _LEVELS
    if not any(mean):
        of_mean = of_std
    if of_mean != of_std:
        both = f"mean {_text(mean)} is of pixels from 0 to {of_mean}, std {_text(std)} of pixels from 0 to {of_std}"
        raise InvalidRequest(f"{both}; give both in one scale, such as 0.485 0.456 0.406 and 0.229 0.224 0.225")
    if of_mean == 1:
        return mean, std
    return _divided(mean, _LEVELS), _divided(std, _LEVELS)


def _divided(values: Triple | float, by: float) -> Triple:
    """`values` / `by`, where a single value is for all channels."""
    red, green, blue = values if isinstance(values, tuple) else (values,) * 3
    return red / by, green / by, blue / by


def _scale(name: str, values: Triple) -> int:
    """The greatest value of a pixel in the scale of `values`."""
    if not all(map(isfinite, values)) or max(values) > _LEVELS:
        raise InvalidRequest(f"{name} {_text(values)}: each must be a number, of pixels from 0 to 1 or from 0 to 255")
    if max(values) <= 1:
        return 1
    if any(0 < value < 1 for value in values):
        raise InvalidRequest(f"{name} {_text(values)}: some are of pixels from 0 to 1, some from 0 to 255; use one")
    return 255


def _text(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


_ADVICE = "import without this file, and say how with --size, --resize, --crop, --mean and --std"
# The defaults of the image processors of transformers that are read. Others do more than resize and normalise, or
# use the same fields for something else: ConvNeXT's crops, and to CLIP's a `size` of one number is the shortest edge.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Pvt": {"resample": 3, "image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)},
        "ViT": {"resample": 2, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)},
    }
)
_TYPE = re.compile(r"(\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
_Side = Annotated[int, Field(gt=0)]


class _Size(BaseModel):
    height: int | None = None
    width: int | None = None


class _Processor(BaseModel):
    """The file of an image processor of transformers; what is missing or null has the default of its kind."""

    model_config = ConfigDict(allow_inf_nan=False)

    do_resize: bool = True
    size: _Size | _Side | tuple[_Side, _Side] = _Size(height=SIDE, width=SIDE)
    resample: Literal[0, 1, 2, 3, 4]  # Pillow's numbers, of which 5, Hamming, is no card's
    do_center_crop: bool = False
    do_pad: bool = False
    do_rescale: bool = True
    rescale_factor: Annotated[float, Field(gt=0)] = 1 / _LEVELS
    do_normalize: bool = True
    image_mean: Triple | float
    image_std: Triple | float

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, content: object) -> object:
        if not isinstance(content, dict):
            return content
        fields = {name: value for name, value in content.items() if value is not None}
        kind = str(fields.get("image_processor_type", fields.get("feature_extractor_type", "PvtImageProcessor")))
        match = _TYPE.fullmatch(kind)
        if match is None or match[1] not in _DEFAULTS:
            raise InvalidRequest(f"{kind[:100]} is another image processor than PVT's and is not read; {_ADVICE}")
        return {**_DEFAULTS[match[1]], **fields}


def read_preprocessor(path: Path, name: str | None = None) -> Preprocessing:
    """The preprocessing of the transformers image processor in the file `path`; messages call it `name`.

    Raises:
        InvalidRequest: it can't be read, or a card can't express it.
    """
    try:
        with path.open("rb") as file:
            return _as_card(_Processor.model_validate(json.loads(file.read(MAX_PREPROCESSOR_BYTES))))
    except (OSError, ValueError, RecursionError, InvalidRequest) as error:
        reason: object = f"no JSON ({error})"
        if isinstance(error, OSError):
            reason = error.strerror or error
        elif isinstance(error, ValidationError):
            reason = reasons(error)
        elif isinstance(error, InvalidRequest):
            reason = error
        raise InvalidRequest(f"{name or path}: {reason}") from error


def _as_card(processor: _Processor) -> Preprocessing:
    """The processor makes (p * factor - mean) / std of pixels p of 0..255; the factor of a card is always 1 / 255.

    Only a stretch is read: the crop of transformers begins half a pixel beside that of torchvision and of cards.
    """
    if not processor.do_resize:
        raise InvalidRequest(f"do_resize is false, and images come in any size; {_ADVICE}")
    if processor.do_pad:
        raise InvalidRequest(f"do_pad is true, and the padding of transformers depends on the batch; {_ADVICE}")
    size = processor.size
    if isinstance(size, _Size):
        height, width = size.height, size.width
    else:
        height, width = size if isinstance(size, tuple) else (size, size)
    if processor.do_center_crop or not (height and width):
        raise InvalidRequest(
            "it does not resize to one height and width, but crops or keeps the aspect ratio, which is not read; "
            f"{_ADVICE}"
        )
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    scale = processor.rescale_factor * _LEVELS if processor.do_rescale else _LEVELS
    return Preprocessing(
        height=height,
        width=width,
        resize="stretch",
        interpolation=_BY_NUMBER[processor.resample],
        mean=_divided(mean, scale),
        std=_divided(std, scale),
    )
