"""`POST /predict`."""

from collections.abc import Sequence
from time import perf_counter
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from app.bodies import FIELD, ImagesBody, Upload, read_uploads
from app.dependencies import EngineDep, SettingsDep
from app.direct import Endpoint
from app.disconnect import cancelled_on_disconnect
from app.preferences import patience_seconds
from app.problems import documented
from app.schemas import PredictQuery, PredictResponse, image_result
from service.errors import ServiceError
from service.results import Predictions

router = APIRouter(tags=["inference"])

_BINARY = {"type": "string", "format": "binary"}
# The body is read by `read_uploads`, not by the framework, so its three forms are described here.
BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {FIELD: {"type": "array", "items": _BINARY}},
                "additionalProperties": False,
            }
        },
        "image/png": {"schema": _BINARY},
        "image/jpeg": {"schema": _BINARY},
        "application/octet-stream": {"schema": _BINARY},
        "application/json": {"schema": ImagesBody.model_json_schema()},
    },
}


@router.post(
    "/predict",
    summary="Classify pictures",
    response_model=PredictResponse,
    responses=documented(401, 404, 413, 415, 422, 429, 503, 504),
    openapi_extra={"requestBody": BODY},
)
async def predict(
    request: Request, query: Annotated[PredictQuery, Query()], engine: EngineDep, settings: SettingsDep
) -> Response:
    """The best classes of one picture or several.

    With several, a bad one becomes an `error` in its place and the others are answered. With a single picture, its
    error is the response.
    """
    with engine.request():
        uploads = await read_uploads(request, settings.max_body_bytes, settings.max_images)
        async with cancelled_on_disconnect(request):
            predictions = await engine.predict(
                [upload.data for upload in uploads],
                model=query.model,
                top_k=query.top_k,
                timeout_seconds=query.timeout_seconds,
                patience_seconds=await patience_seconds(request),
            )
    _note(request, predictions)
    start = perf_counter()
    body = _body(uploads, predictions, request.state.request_id)
    engine.encoded(predictions, perf_counter() - start)
    return Response(body, media_type="application/json")


async def _direct(request: Request, query: BaseModel) -> Response:
    assert isinstance(query, PredictQuery)  # noqa: S101  DIRECT says so
    return await predict(request, query, request.state.engine, request.state.settings)


DIRECT = Endpoint("/predict", PredictQuery, _direct)


def _body(uploads: Sequence[Upload], predictions: Predictions, request_id: str) -> bytes:
    """A PredictResponse as JSON; making one first would cost as much as all else here."""
    results = [
        image_result(upload.filename, result, request_id)
        for upload, result in zip(uploads, predictions.results, strict=True)
    ]
    return orjson.dumps({"model": predictions.model, "version": predictions.version, "results": results})


def _note(request: Request, predictions: Predictions) -> None:
    """Leave what the middleware writes into headers and log; of several pictures the slowest one's times."""
    request.state.log = {"model": predictions.model, "images": len(predictions.results)}
    answered = [result for result in predictions.results if not isinstance(result, ServiceError)]
    if answered:
        request.state.timing = max((each.timing for each in answered), key=sum)._asdict()
    elif len(predictions.results) == 1 and isinstance(error := predictions.results[0], ServiceError):
        raise error
