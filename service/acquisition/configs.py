"""The `config.json` beside a model's weights, as transformers and timm write it, and what it says of the model.

transformers: `PvtV2Config.save_pretrained`. timm: `save_config_for_hf` of its `models/_hub.py`, and the older form, in
which the fields of `pretrained_cfg` lie beside `architecture`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.acquisition.catalogue import CLASSES, imagenet_labels
from service.acquisition.preprocessing import PRESETS, Triple
from service.architecture.variants import VARIANTS
from service.errors import InvalidRequest, WeightsMismatch, reasons
from service.files import read_small
from service.store.cards import Preprocessing
from service.store.store import DEFAULT_TAG

CONFIG_FILE = "config.json"
_MAX_BYTES = 16_000_000  # the names of 21,000 classes take one
_RGB = 3
_SYNSET = re.compile(r"n\d{8}")

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
_Side = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a config.json says of the model beside it; None is what it does not say.

    `preprocessing` is that of the library where the file has none of its own; `about_images` says whose it is.
    """

    library: Literal["transformers", "timm"]
    variant: str
    preprocessing: Preprocessing
    about_images: str
    labels: tuple[str, ...] | None = None
    num_labels: int | None = None
    problem_type: ProblemType | None = None
    licence: str | None = None
    source: str | None = None


class _Foreign(BaseModel):
    """A file of another library: fields that matter here are checked, others are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Transformers(_Foreign):
    """`PvtV2Config`, with its defaults."""

    depths: tuple[int, ...] = (2, 2, 2, 2)
    hidden_sizes: tuple[int, ...] = (32, 64, 160, 256)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    num_attention_heads: tuple[int, ...] = (1, 2, 5, 8)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    linear_attention: bool = False
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    num_channels: int = _RGB
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    image_size: _Side | tuple[_Side, _Side] | None = None
    id2label: dict[int, str] | None = None
    num_labels: int | None = None
    problem_type: ProblemType | None = None
    license: str | None = None


class _Pretrained(_Foreign):
    """timm's `PretrainedCfg`, with its defaults."""

    input_size: tuple[_Side, _Side, _Side] = (_RGB, 224, 224)
    interpolation: str = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    crop_mode: str = "center"
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)
    num_classes: int | None = None
    label_names: list[str] | dict[int, str] | None = None
    label_descriptions: dict[str, str] | None = None
    license: str | None = None
    origin_url: str | None = None
    hf_hub_id: str | None = None
    tag: str | None = None


class _Timm(_Foreign):
    architecture: str
    num_classes: int | None = None
    label_names: list[str] | dict[int, str] | None = None
    label_descriptions: dict[str, str] | None = None
    model_args: dict[str, Any] = {}
    pretrained_cfg: _Pretrained


# The fields of a row of VARIANTS under the names of each library.
_ROW_IN_TRANSFORMERS = {
    "depths": "depths", "hidden_sizes": "embed_dims", "mlp_ratios": "mlp_ratios", "num_attention_heads": "num_heads",
    "sr_ratios": "sr_ratios", "linear_attention": "linear",
}  # fmt: skip
_ROW_IN_TIMM = ("depths", "embed_dims", "mlp_ratios", "num_heads", "sr_ratios", "qkv_bias", "linear")


def read_config(path: Path) -> Config:
    """What the config.json at `path` says.

    Raises:
        InvalidRequest: it can't be read, or says what no card can.
        WeightsMismatch: it is of another architecture than PVT-v2's variants.
    """
    try:
        return _config(json.loads(read_small(path, _MAX_BYTES, "config")))
    except WeightsMismatch as error:
        raise WeightsMismatch(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError, InvalidRequest) as error:
        why: object = f"no JSON ({error})"
        if isinstance(error, OSError):
            why = error.strerror or error
        elif isinstance(error, ValidationError):
            why = reasons(error)
        elif isinstance(error, InvalidRequest):
            why = error
        raise InvalidRequest(f"{path}: {why}; correct it, or import the weights file alone with --variant") from error


def _config(content: object) -> Config:
    if not isinstance(content, dict):
        raise InvalidRequest("JSON, but no object")
    return _of_timm(content) if "architecture" in content else _of_transformers(content)


def _of_transformers(content: Mapping[str, Any]) -> Config:
    kind, names = content.get("model_type"), content.get("architectures") or ["no architectures"]
    if kind != "pvt_v2":
        raise WeightsMismatch(
            f"it is of a {str(names)[:100]}, model_type {str(kind)[:100]!r}; only transformers' 'pvt_v2' and timm's "
            f"{', '.join(VARIANTS)} are served"
        )
    config = _Transformers.model_validate({name: value for name, value in content.items() if value is not None})
    preset, size = PRESETS["transformers"], config.image_size
    if size is not None:
        height, width = size if isinstance(size, tuple) else (size, size)
        preset = _checked(preset.model_dump() | {"height": height, "width": width})
    labels = None if config.id2label is None else _by_number("id2label", config.id2label)
    return Config(
        library="transformers",
        variant=_variant_in_transformers(config),
        preprocessing=preset,
        about_images=f"the defaults of transformers, at the image_size of {CONFIG_FILE}",
        labels=labels,
        num_labels=len(labels) if labels else config.num_labels,
        problem_type=config.problem_type,
        licence=config.license,
    )


def _variant_in_transformers(config: _Transformers) -> str:
    """The variant with this configuration, of which the tensors' shapes show only a part: not the number of heads."""
    fixed = {"patch_sizes", "strides", "num_channels", "hidden_act", "layer_norm_eps", "qkv_bias"}
    defaults = _Transformers()
    if other := [name for name in sorted(fixed) if getattr(config, name) != getattr(defaults, name)]:
        wrong = ", ".join(f"{name} {getattr(config, name)} (not {getattr(defaults, name)})" for name in other)
        raise WeightsMismatch(f"it is of no PVT-v2 of the paper, whose variants are served: {wrong}")
    differences = {
        variant: [
            f"{name} {found} (not {wanted})"
            for name, field in _ROW_IN_TRANSFORMERS.items()
            if (found := getattr(config, name)) != (wanted := getattr(row, field))
        ]
        for variant, row in VARIANTS.items()
    }
    nearest = min(differences, key=lambda variant: len(differences[variant]))
    if differences[nearest]:
        raise WeightsMismatch(
            f"it is of no variant; the nearest is {nearest}, but for {', '.join(differences[nearest])}"
        )
    return nearest


def _of_timm(content: Mapping[str, Any]) -> Config:
    if "pretrained_cfg" not in content:
        content = {"label_names": content.get("labels"), **content, "pretrained_cfg": content}
    config = _Timm.model_validate({name: value for name, value in content.items() if value is not None})
    variant = config.architecture.partition(".")[0]
    if variant not in VARIANTS:
        raise WeightsMismatch(f"it is of timm's {config.architecture[:100]!r}; served are {', '.join(VARIANTS)}")
    row = VARIANTS[variant]
    for name in _ROW_IN_TIMM:
        found, wanted = config.model_args.get(name), getattr(row, name)
        if found is not None and (tuple(found) if isinstance(found, list) else found) != wanted:
            raise WeightsMismatch(f"its model_args make it another model than {variant}: {name} {found}, not {wanted}")
    about = config.pretrained_cfg
    count = config.num_classes if config.num_classes is not None else about.num_classes
    return Config(
        library="timm",
        variant=variant,
        preprocessing=_preprocessing_of_timm(about),
        about_images=f"pretrained_cfg of {CONFIG_FILE}",
        labels=_labels_of_timm(config, count),
        num_labels=count,
        licence=about.license,
        source=about.origin_url or (about.hf_hub_id and f"https://huggingface.co/{about.hf_hub_id}"),
    )


def _preprocessing_of_timm(config: _Pretrained) -> Preprocessing:
    """What `timm.data.create_transform` does with these fields, as `transforms_imagenet_eval` of its data package."""
    channels, height, width = config.input_size
    if channels != _RGB:
        raise InvalidRequest(f"input_size {config.input_size}: images have three channels here, not {channels}")
    fields: dict[str, object] = {
        "height": height, "width": width, "interpolation": config.interpolation, "mean": config.mean, "std": config.std
    }  # fmt: skip
    if config.crop_mode == "center":
        return _checked(fields | {"crop": config.crop_pct})
    if config.crop_mode == "squash" and config.crop_pct == 1:
        return _checked(fields | {"resize": "stretch"})
    raise InvalidRequest(
        f"crop_mode {config.crop_mode[:100]!r} with crop_pct {config.crop_pct}: cards know 'center', and 'squash' with "
        "crop_pct 1"
    )


def _checked(fields: Mapping[str, object]) -> Preprocessing:
    try:
        return Preprocessing.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(reasons(error, "preprocessing")) from error


def _labels_of_timm(config: _Timm, count: int | None) -> tuple[str, ...] | None:
    """Names by class; of ImageNet's synsets their descriptions. Where there are none, ImageNet's for its own weights.

    timm takes the latter by the number of classes alone: `infer_imagenet_subset` of its data package.
    """
    about = config.pretrained_cfg
    names, texts = config.label_names or about.label_names, config.label_descriptions or about.label_descriptions or {}
    if not names:
        own = (about.tag or "").endswith(DEFAULT_TAG) and count == CLASSES
        return imagenet_labels() if own else None
    labels = _by_number("label_names", names, count) if isinstance(names, dict) else names
    return tuple(texts.get(name, name) if _SYNSET.fullmatch(name) else name for name in labels)


def _by_number(field: str, names: Mapping[int, str], count: int | None = None) -> tuple[str, ...]:
    """The names of classes 0, 1, ...; `count` allows gaps, whose classes are called after their numbers."""
    most = count or len(names)
    if wrong := sorted(number for number in names if not 0 <= number < most):
        raise InvalidRequest(f"{field}: it names class {wrong[0]}, but its {most} classes count from 0 to {most - 1}")
    if count is None and (missing := next((number for number in range(most) if number not in names), None)):
        raise InvalidRequest(f"{field}: it has no name for class {missing}")
    return tuple(names.get(number, f"class {number}") for number in range(most))
