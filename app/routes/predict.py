"""`POST /predict`."""

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.bodies import Upload
from app.dependencies import max_wait_seconds, require_key
from app.openapi import INFERENCE
from app.routes.inference import (
    DOCUMENTED,
    EXAMPLE_IMAGE,
    EXAMPLE_MODEL,
    JSON,
    ImageError,
    InferenceQuery,
    InferenceRoute,
    encoded,
    image_error,
    note,
    uploaded,
)
from service.errors import ServiceError
from service.postprocess import Predictions

router = APIRouter(tags=[INFERENCE], route_class=InferenceRoute, dependencies=[Depends(require_key)])

_EXAMPLE: dict[str, Any] = {
    "predictions": [{"class_id": 7, "label": "7", "score": 0.9713}, {"class_id": 8, "label": "8", "score": 0.0069}]
}


class PredictQuery(InferenceQuery):
    """Parameters of `POST /predict`."""

    top_k: Annotated[int, Field(ge=1, le=1000, description="How many classes to name, best first.")] = 5


class ClassPrediction(BaseModel):
    """One class; `score` is its share of the softmax over all classes."""

    class_id: int
    label: str
    score: float


class ImageResult(BaseModel):
    """The result for one image; width and height are its own, in pixels."""

    filename: str | None
    width: int
    height: int
    predictions: list[ClassPrediction]


class PredictResponse(BaseModel):
    """The results, in the order of the images."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{**EXAMPLE_MODEL, "results": [{**EXAMPLE_IMAGE, **_EXAMPLE}]}]}
    )

    model: str
    version: str
    results: list[ImageResult | ImageError]


@router.post(
    "/predict",
    operation_id="predict",
    summary="Classify images",
    response_model=PredictResponse,
    **DOCUMENTED,
)
async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
    """The best classes of one image or several.

    With several, a bad one becomes an `error` in its place and the others have results. With a single image, its error
    is the response.
    """
    state = request.state
    async with uploaded(request, query) as uploads:
        predictions = await state.engine.predict(
            [upload.data for upload in uploads],
            model=query.model,
            top_k=query.top_k,
            size=query.input_size,
            max_wait_seconds=await max_wait_seconds(request),
            timeout_seconds=query.timeout_seconds,
        )
    note(request, predictions)
    body = await encoded(request, predictions.model, lambda: _body(uploads, predictions, state.request_id))
    return Response(body, media_type=JSON)


def _body(uploads: Sequence[Upload], predictions: Predictions, request_id: str) -> bytes:
    """A PredictResponse as JSON; making one first would cost as much as all else in this module."""
    results: list[dict[str, Any]] = []
    for upload, result in zip(uploads, predictions.results, strict=True):
        if isinstance(result, ServiceError):
            results.append(image_error(upload.filename, result, request_id))
            continue
        # A ClassScore has a ClassPrediction's fields, and orjson knows dataclasses.
        size = {"width": result.width, "height": result.height}
        results.append({"filename": upload.filename, **size, "predictions": result.classes})
    return orjson.dumps({"model": predictions.model, "version": predictions.version, "results": results})
