"""The bodies that go out."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.problems import Problem, problem
from service.cards import Accuracy
from service.errors import ServiceError
from service.executable import Executable
from service.explain import Explanation
from service.models import ModelStatus
from service.results import Prediction

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

    model: str
    version: str
    size: InputSize
    results: list[ImageExplanation | ImageError]


class BatchSize(BaseModel):
    """A compiled batch size and its measured time, while all instances run."""

    size: int
    ms: float


class CoreLayout(BaseModel):
    """`streams` batches run at a time, each on `threads` cores."""

    streams: int
    threads: int


class ModelInfo(BaseModel):
    """A model of the store; the second half is there once it is loaded."""

    id: str
    variant: str
    version: str
    state: Literal["available", "loading", "ready", "failed"]
    default: bool
    reason: Annotated[str | None, Field(description="Why the model failed.")] = None
    num_classes: int | None = None
    input_size: Annotated[tuple[int, int] | None, Field(description="Height and width, in pixels.")] = None
    parameters: int | None = None
    accuracy: Accuracy | None = None
    licence: str | None = None
    backend: str | None = None
    precision: str | None = None
    memory_bytes: Annotated[
        int | None,
        Field(description="Resident memory that loading took; the first model's includes the libraries' own."),
    ] = None
    batch_plan: list[BatchSize] | None = None
    alone_ms: Annotated[
        float | None, Field(description="Measured time of a lone image on all cores, where that pays.")
    ] = None
    layout: CoreLayout | None = None
    plan_cached: Annotated[bool | None, Field(description="Whether plan and graphs came from PVT_CACHE_DIR.")] = None
    notes: Annotated[list[str] | None, Field(description="What was tried and left out, and why.")] = None
    load_seconds: float | None = None


class ModelList(BaseModel):
    """Every model of the store."""

    models: list[ModelInfo]


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


def model_info(model: ModelStatus) -> ModelInfo:
    """What is known of `model`: from its card, and from memory once it is there."""
    stored, status = model.stored, model.status
    failure = status.failure or stored.failure
    info = ModelInfo(
        id=stored.id,
        variant=stored.variant,
        version=stored.version,
        state="failed" if failure else status.state,
        default=model.default,
        reason=str(failure) if failure else None,
    )
    if card := stored.card:
        size = (card.preprocessing.height, card.preprocessing.width)
        known = {"num_classes": len(card.labels), "input_size": size, "parameters": card.parameters}
        info = info.model_copy(update={**known, "accuracy": card.accuracy, "licence": card.licence})
    return info.model_copy(update=_loaded(status.loaded.executable)) if status.loaded else info


def _loaded(executable: Executable) -> dict[str, object]:
    """What is known of a model once it is in memory."""
    plan, report = executable.plan, executable.report
    return {
        "backend": report.backend,
        "precision": report.precision,
        "memory_bytes": report.memory_bytes,
        "batch_plan": [BatchSize(size=n, ms=round(t * 1000, 3)) for n, t in plan.seconds.items()],
        "alone_ms": None if plan.alone_seconds is None else round(plan.alone_seconds * 1000, 3),
        "layout": CoreLayout(**report.layout._asdict()),
        "plan_cached": report.cached,
        "notes": list(report.notes),
        "load_seconds": round(report.load_seconds, 3),
    }
