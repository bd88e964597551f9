"""The parameters that come in with pictures."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from service.postprocess.features import FeatureOptions

_SIZE = re.compile(r"(?P<height>[1-9]\d{0,4})(x(?P<width>[1-9]\d{0,4}))?", re.ASCII)
_BEYOND = {"greater_than_equal", "less_than_equal"}
_STAGES = re.compile(r"[1-4](,[1-4])*")


def _is_size(value: str) -> str:
    if not _SIZE.fullmatch(value):
        raise ValueError("must be a side in pixels, such as 224, or height and width, such as 256x384")
    return value


def _are_stages(value: str) -> str:
    if value and (not _STAGES.fullmatch(value) or len({*value.split(",")}) < len(value.split(","))):
        raise ValueError("must be different numbers from 1 to 4, separated by commas, such as 1,4")
    return value


def _bounds(field: FieldInfo) -> str:
    low = [str(each.ge) for each in field.metadata if isinstance(each, Ge)]
    high = [str(each.le) for each in field.metadata if isinstance(each, Le)]
    return f"from {low[0]} to {high[0]}" if low and high else f"at least {low[0]}" if low else ""


class InferenceQuery(BaseModel):
    """Parameters of every endpoint that takes pictures."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="wrap")
    @classmethod
    def _in_range(cls, value: object, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
        """As `check`, but a number out of range is told the whole range, not the bound that it broke."""
        try:
            return check(value)
        except ValidationError as error:
            bounds = _bounds(cls.model_fields[info.field_name or ""])
            if not bounds or error.errors()[0]["type"] not in _BEYOND:
                raise
            raise PydanticCustomError("out_of_range", "must be {range}", {"range": bounds}) from error

    model: Annotated[
        str | None, Field(description="`<variant>.<tag>`, or a variant alone; the service's default model if absent.")
    ] = None
    size: Annotated[
        str | None,
        AfterValidator(_is_size),
        Field(
            description="The side of the square that pictures are resized to and cropped to, or `<height>x<width>`: "
            "multiples of 32, up to PVT_MAX_INPUT_SIDE; the model's own size if absent.",
            examples=["224", "256x384"],
        ),
    ] = None
    timeout_ms: Annotated[
        int | None,
        Field(ge=1, le=3_600_000, description="Answer within this time or not at all; default PVT_TIMEOUT_MS."),
    ] = None

    @property
    def timeout_seconds(self) -> float | None:
        """The timeout in seconds."""
        return None if self.timeout_ms is None else self.timeout_ms / 1000

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width; None for the model's own."""
        match = _SIZE.fullmatch(self.size) if self.size else None
        return match and (int(match["height"]), int(match["width"] or match["height"]))


class PredictQuery(InferenceQuery):
    """Parameters of `POST /predict`."""

    top_k: Annotated[int, Field(ge=1, le=1000, description="How many classes to name, best first.")] = 5


class FeaturesQuery(InferenceQuery):
    """Parameters of `POST /features`."""

    embedding: Annotated[bool, Field(description="Whether the answer has the embedding.")] = True
    stages: Annotated[
        str,
        AfterValidator(_are_stages),
        Field(description="Stages whose feature maps are wanted, such as `1,4`; their strides are 4, 8, 16 and 32."),
    ] = ""
    pool: Annotated[
        Literal["avg", "none"], Field(description="`avg`: the mean of each map over its positions, not the map.")
    ] = "none"
    normalize: Annotated[
        bool, Field(description="Scale each vector of channels, in a map the one at each position, to length 1.")
    ] = False
    dtype: Annotated[
        Literal["float32", "float16"], Field(description="Of the numbers; float16 halves the binary forms.")
    ] = "float32"

    @property
    def wanted(self) -> FeatureOptions:
        """The same, as the engine's."""
        stages = tuple(int(stage) for stage in self.stages.split(",") if stage)
        return FeatureOptions(self.embedding, stages, self.pool, self.normalize, self.dtype)


class ExplainQuery(InferenceQuery):
    """Parameters of `POST /explain`."""

    class_id: Annotated[
        int | None, Field(ge=0, description="The class to explain; each picture's most likely one if absent.")
    ] = None
    alpha: Annotated[
        float,
        Field(ge=0, le=1, allow_inf_nan=False, description="How opaque the map lies on the picture (PNG only)."),
    ] = 0.5
