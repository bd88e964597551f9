"""The bodies that go out."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.answer_examples import EXPLAINED, FEATURES, PREDICTED
from app.problems import Problem, problem
from service.errors import ServiceError
from service.postprocess.activation_maps import Explanation
from service.postprocess.classes import Prediction

InputSize = Annotated[tuple[int, int], Field(description="Of the model's input: height and width, in pixels.")]


class ClassPrediction(BaseModel):
    """One class; `score` is its share of the softmax over all classes."""

    class_id: int
    label: str
    score: float


class ImageResult(BaseModel):
    """The answer for one picture; width and height are its own, in pixels."""

    filename: str | None
    width: int
    height: int
    predictions: list[ClassPrediction]


class ImageError(BaseModel):
    """The problem of one picture among several."""

    filename: str | None
    error: Problem


class PredictResponse(BaseModel):
    """The results, in the order of the pictures."""

    model_config = ConfigDict(json_schema_extra={"examples": [PREDICTED]})

    model: str
    version: str
    results: list[ImageResult | ImageError]


class StageMap(BaseModel):
    """A feature map: `shape` is channels, height, width, or channels alone; `data` is flat, the last axis fastest."""

    shape: list[int]
    data: list[float]


class ImageFeatures(BaseModel):
    """The features of one picture; width and height are its own, in pixels, `stages` is by number."""

    filename: str | None
    width: int
    height: int
    embedding: list[float] | None = None
    stages: dict[str, StageMap] | None = None


class FeaturesResponse(BaseModel):
    """The features, in the order of the pictures."""

    model_config = ConfigDict(json_schema_extra={"examples": [FEATURES]})

    model: str
    version: str
    size: InputSize
    results: list[ImageFeatures | ImageError]


class ImageExplanation(BaseModel):
    """What speaks for one class where: the mean of `map`, plus `bias`, is `logit`."""

    filename: str | None
    width: int
    height: int
    class_id: int
    label: str
    score: float
    logit: float
    bias: float
    map: Annotated[list[list[float]], Field(description="Rows, top to bottom; a cell is 32 x 32 pixels of the input.")]


class ExplainResponse(BaseModel):
    """The explanations, in the order of the pictures."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXPLAINED]})

    model: str
    version: str
    size: InputSize
    results: list[ImageExplanation | ImageError]


class HealthResponse(BaseModel):
    """`reasons` says what is wrong; empty when nothing is."""

    live: bool
    ready: bool
    reasons: list[str]


def image_result(filename: str | None, result: Prediction | ServiceError, request_id: str) -> dict[str, object]:
    """One place of `PredictResponse.results`: an ImageResult or an ImageError, as orjson takes it."""
    if isinstance(result, ServiceError):
        return image_error(filename, result, request_id)
    # A ClassScore has a ClassPrediction's fields, and orjson knows dataclasses.
    return {"filename": filename, "width": result.width, "height": result.height, "predictions": result.classes}


def image_error(filename: str | None, error: ServiceError, request_id: str) -> dict[str, object]:
    """An ImageError, as orjson takes it."""
    return {"filename": filename, "error": problem(error, request_id).model_dump()}


def explanation_result(filename: str | None, result: Explanation | ServiceError, request_id: str) -> dict[str, object]:
    """An ImageExplanation or an ImageError, as orjson takes it."""
    if isinstance(result, ServiceError):
        return image_error(filename, result, request_id)
    return {
        "filename": filename,
        "width": result.inferred.width,
        "height": result.inferred.height,
        "class_id": result.class_id,
        "label": result.label,
        "score": result.score,
        "logit": result.logit,
        "bias": result.bias,
        "map": result.map,
    }
