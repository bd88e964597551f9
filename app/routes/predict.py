"""`POST /predict`."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from app.bodies import Upload
from app.dependencies import EngineDep
from app.direct import Endpoint
from app.openapi import INFERENCE, PICTURE_PROBLEMS, PICTURES
from app.preferences import patience_seconds
from app.problems import documented
from app.queries import PredictQuery
from app.routes.inference import answered, encoded
from app.schemas import PredictResponse, image_result
from service.postprocess.classes import Predictions

router = APIRouter(tags=[INFERENCE])


@router.post(
    "/predict",
    summary="Classify pictures",
    response_model=PredictResponse,
    responses=documented(*PICTURE_PROBLEMS),
    openapi_extra={"requestBody": PICTURES},
)
async def predict(request: Request, query: Annotated[PredictQuery, Query()], engine: EngineDep) -> Response:
    """The best classes of one picture or several.

    With several, a bad one becomes an `error` in its place and the others are answered. With a single picture, its
    error is the response.
    """
    infer = partial(
        engine.predict,
        model=query.model,
        top_k=query.top_k,
        size=query.input_size,
        max_wait_seconds=await patience_seconds(request),
        timeout_seconds=query.timeout_seconds,
    )
    uploads, predictions = await answered(request, infer, query.timeout_seconds)
    body = await encoded(request, predictions.model, lambda: _body(uploads, predictions, request.state.request_id))
    return Response(body, media_type="application/json")


async def _direct(request: Request, query: BaseModel) -> Response:
    assert isinstance(query, PredictQuery)  # noqa: S101  DIRECT says so
    return await predict(request, query, request.state.engine)


DIRECT = Endpoint("/predict", PredictQuery, _direct)


def _body(uploads: Sequence[Upload], predictions: Predictions, request_id: str) -> bytes:
    """A PredictResponse as JSON; making one first would cost as much as all else here."""
    results = [
        image_result(upload.filename, result, request_id)
        for upload, result in zip(uploads, predictions.results, strict=True)
    ]
    return orjson.dumps({"model": predictions.model, "version": predictions.version, "results": results})
