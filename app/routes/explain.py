"""`POST /explain`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from app.accept import choose
from app.bodies import Upload
from app.dependencies import EngineDep
from app.direct import Endpoint
from app.problems import documented
from app.queries import ExplainQuery
from app.routes.inference import BODY, LARGE, answered, encoded
from app.schemas import ExplainResponse, explanation_result
from service.encodings import NPY, encode
from service.errors import InvalidRequest
from service.explain import explain, maps, overlay
from service.results import Answered, whole

router = APIRouter(tags=["inference"])

PNG, JSON = "image/png", "application/json"
FORMS = (PNG, JSON, NPY)
_BINARY = {"schema": {"type": "string", "format": "binary"}}


@router.post(
    "/explain",
    summary="Where in a picture a class is seen",
    response_model=None,
    responses={
        200: {"model": ExplainResponse, "content": dict.fromkeys((PNG, NPY), _BINARY)},
        **documented(401, 404, 406, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra={"requestBody": BODY},
)
async def show(request: Request, query: Annotated[ExplainQuery, Query()], engine: EngineDep) -> Response:
    """The exact class activation map of one class: the mean of its map, plus its bias, is its logit.

    As a PNG of one picture, as the model saw it, with the map on it; or, with an `Accept` for it, as JSON or `.npy`.
    """
    form = choose(request, FORMS)
    infer = partial(
        engine.infer, model=query.model, size=query.input_size, stages=True, timeout_seconds=query.timeout_seconds
    )
    uploads, answer = await answered(request, infer)
    makers: dict[str, Callable[[], bytes]] = {
        PNG: partial(_png, answer, query),
        NPY: partial(_npy, uploads, answer, query),
        JSON: partial(_json, uploads, answer, query, request.state.request_id),
    }
    numbers = LARGE + 1 if form == PNG else 0  # compressing takes milliseconds
    body = await encoded(engine, answer.model, makers[form], numbers)
    return Response(body, media_type=form)


async def _direct(request: Request, query: BaseModel) -> Response:
    assert isinstance(query, ExplainQuery)  # noqa: S101  DIRECT says so
    return await show(request, query, request.state.engine)


DIRECT = Endpoint("/explain", ExplainQuery, _direct)


def _png(answer: Answered, query: ExplainQuery) -> bytes:
    if len(answer.results) > 1:
        raise InvalidRequest(
            f"{PNG} shows one picture and {len(answer.results)} came; send one, or ask for {JSON} or {NPY}"
        )
    (explanation,) = whole(explain(answer, query.class_id), [None])
    return overlay(explanation, query.alpha)


def _npy(uploads: Sequence[Upload], answer: Answered, query: ExplainQuery) -> bytes:
    explanations = whole(explain(answer, query.class_id), [upload.filename for upload in uploads])
    return encode({"map": maps(explanations)}, NPY, {})


def _json(uploads: Sequence[Upload], answer: Answered, query: ExplainQuery, request_id: str) -> bytes:
    """An ExplainResponse."""
    results = [
        explanation_result(upload.filename, each, request_id)
        for upload, each in zip(uploads, explain(answer, query.class_id), strict=True)
    ]
    return orjson.dumps({"model": answer.model, "version": answer.version, "results": results})
