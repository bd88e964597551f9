"""`POST /explain`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from app.accept import choose
from app.bodies import Upload
from app.dependencies import EngineDep
from app.direct import Endpoint
from app.openapi import BINARY, INFERENCE, PICTURE_PROBLEMS, PICTURES
from app.preferences import patience_seconds
from app.problems import documented
from app.queries import ExplainQuery
from app.routes.inference import LARGE, answered, encoded
from app.schemas import ExplainResponse, explanation_result
from service.answers.encodings import NPY, encode, json_bytes
from service.errors import InvalidRequest
from service.postprocess.activation_maps import check_class, explain, maps, numbers, overlay
from service.results import JSON_INSTEAD, Image, InferenceResult, require_all

router = APIRouter(tags=[INFERENCE])

PNG, JSON = "image/png", "application/json"
FORMS = (PNG, JSON, NPY)
_BINARY = {"schema": BINARY}


@router.post(
    "/explain",
    operation_id="explain",
    summary="Where in a picture a class is seen",
    response_model=None,
    responses={
        200: {"model": ExplainResponse, "content": dict.fromkeys((PNG, NPY), _BINARY)},
        **documented(406, *PICTURE_PROBLEMS),
    },
    openapi_extra={"requestBody": PICTURES},
)
async def show(request: Request, query: Annotated[ExplainQuery, Query()], engine: EngineDep) -> Response:
    """The exact class activation map of one class: the mean of its map, plus its bias, is its logit.

    As a PNG of one picture, as the model saw it, with the map on it; or, with an `Accept` for it, as JSON or `.npy`.
    """
    form = choose(request, FORMS)

    async def infer(images: list[Image]) -> InferenceResult:
        if form == PNG and len(images) > 1:
            raise InvalidRequest(
                f"{PNG} shows one picture and {len(images)} came; send one, or ask for {JSON} or {NPY}"
            )
        return await engine.infer(
            images,
            model=query.model,
            size=query.input_size,
            stages=True,
            check=partial(check_class, query.class_id),
            max_wait_seconds=await patience_seconds(request),
            timeout_seconds=query.timeout_seconds,
        )

    uploads, answer = await answered(request, infer, query.timeout_seconds)
    makers: dict[str, Callable[[], bytes]] = {
        PNG: partial(_png, answer, query),
        NPY: partial(_npy, uploads, answer, query),
        JSON: partial(_json, uploads, answer, query, request.state.request_id),
    }
    count = LARGE + 1 if form == PNG else numbers(answer)  # compressing takes milliseconds
    body = await encoded(request, answer.model, makers[form], count)
    return Response(body, media_type=form)


async def _direct(request: Request, query: BaseModel) -> Response:
    assert isinstance(query, ExplainQuery)  # noqa: S101  DIRECT says so
    return await show(request, query, request.state.engine)


DIRECT = Endpoint("/explain", ExplainQuery, _direct)


def _png(answer: InferenceResult, query: ExplainQuery) -> bytes:
    (explanation,) = require_all(explain(answer, query.class_id), [None])
    return overlay(explanation, query.alpha)


def _npy(uploads: Sequence[Upload], answer: InferenceResult, query: ExplainQuery) -> bytes:
    explanations = require_all(explain(answer, query.class_id), [upload.filename for upload in uploads], JSON_INSTEAD)
    return encode({"map": maps(explanations)}, NPY, {})


def _json(uploads: Sequence[Upload], answer: InferenceResult, query: ExplainQuery, request_id: str) -> bytes:
    """An ExplainResponse."""
    results = [
        explanation_result(upload.filename, each, request_id)
        for upload, each in zip(uploads, explain(answer, query.class_id), strict=True)
    ]
    return json_bytes({"model": answer.model, "version": answer.version, "size": answer.size, "results": results})
