"""`POST /predict`."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field

from app.bodies import Upload
from app.dependencies import require_key
from app.openapi import INFERENCE
from app.routes.inference import (
    JSON,
    ImageError,
    ImageInfo,
    InferenceQuery,
    InferenceRoute,
    documentation,
    encoded,
    example,
    image_results,
    infer,
)
from service.errors import ServiceError
from service.postprocess.classes import top_k
from service.results import InferenceResult

router = APIRouter(tags=[INFERENCE], route_class=InferenceRoute, dependencies=[Depends(require_key)])

_EXAMPLE = [{"class_id": 7, "label": "7", "score": 0.9713}, {"class_id": 8, "label": "8", "score": 0.0069}]


class PredictQuery(InferenceQuery):
    """Parameters of `POST /predict`."""

    top_k: Annotated[int, Field(ge=1, le=1000, description="How many classes to name, best first.")] = 5


class ClassPrediction(BaseModel):
    """One class; `score` is its share of the softmax over all classes."""

    class_id: int
    label: str
    score: float


class ImageResult(ImageInfo):
    """The result for one image; width and height are its own, in pixels."""

    predictions: list[ClassPrediction]


class PredictResponse(BaseModel):
    """The results, in the order of the images."""

    model_config = example({"predictions": _EXAMPLE})

    model: str
    version: str
    results: list[ImageResult | ImageError]


@router.post(
    "/predict",
    operation_id="predict",
    summary="Classify images",
    response_model=PredictResponse,
    **documentation(),
)
async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
    """The best classes of one image or several.

    With several, a bad one becomes an `error` in its place and the others have results. With a single image, its error
    is the response.
    """
    uploads, result = await infer(request, query)
    body = await encoded(request, result, partial(_body, uploads, result, query.top_k, request.state.request_id))
    return Response(body, media_type=JSON)


def _body(uploads: Sequence[Upload], result: InferenceResult, count: int, request_id: str) -> bytes:
    """A PredictResponse as JSON; building the model first would cost as much as all else in this module."""
    results = image_results(uploads, result, request_id)
    for entry, image in zip(results, result.results, strict=True):
        if not isinstance(image, ServiceError):
            # A ClassScore has a ClassPrediction's fields, and orjson knows dataclasses.
            entry["predictions"] = top_k(image.outputs.logits, result.card.labels, count)
    return orjson.dumps({"model": result.model, "version": result.version, "results": results})
