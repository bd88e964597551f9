"""`POST /explain`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.bodies import Upload
from app.dependencies import max_wait_seconds, require_key
from app.encodings import NPY, encode, json_bytes
from app.openapi import BINARY_CONTENT, IMAGE_PROBLEMS, IMAGES, INFERENCE
from app.problems import documented
from app.routes.inference import (
    EXAMPLE_IMAGE,
    EXAMPLE_MODEL,
    JSON,
    LARGE,
    ImageError,
    InferenceQuery,
    InferenceRoute,
    InputSize,
    chosen_media_type,
    encoded,
    image_error,
    note,
    uploaded,
)
from service.errors import InvalidRequest, ServiceError
from service.postprocess import check_class, explain, maps, numbers, overlay
from service.results import JSON_INSTEAD, InferenceResult, require_all

router = APIRouter(tags=[INFERENCE], route_class=InferenceRoute, dependencies=[Depends(require_key)])

PNG = "image/png"
MEDIA_TYPES = (PNG, JSON, NPY)
_FIELDS = ("class_id", "label", "score", "logit", "bias", "map")
_EXAMPLE: dict[str, Any] = dict(zip(_FIELDS, (7, "7", 0.9713, 5.5, -0.5, [[4.0, 8.0], [5.0, 7.0]]), strict=True))


class ExplainQuery(InferenceQuery):
    """Parameters of `POST /explain`."""

    class_id: Annotated[
        int | None, Field(ge=0, description="The class to explain; each image's most likely one if absent.")
    ] = None
    alpha: Annotated[
        float,
        Field(ge=0, le=1, allow_inf_nan=False, description="How opaque the map lies on the image (PNG only)."),
    ] = 0.5


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
    """The explanations, in the order of the images."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{**EXAMPLE_MODEL, "size": [64, 64], "results": [{**EXAMPLE_IMAGE, **_EXAMPLE}]}]
        }
    )

    model: str
    version: str
    size: InputSize
    results: list[ImageExplanation | ImageError]


@router.post(
    "/explain",
    operation_id="explain",
    summary="Where in an image a class is seen",
    response_model=None,
    responses={
        200: {"model": ExplainResponse, "content": dict.fromkeys((PNG, NPY), BINARY_CONTENT)},
        **documented(406, *IMAGE_PROBLEMS),
    },
    openapi_extra={"requestBody": IMAGES},
)
async def show(request: Request, query: Annotated[ExplainQuery, Query()]) -> Response:
    """The exact class activation map of one class: the mean of its map, plus its bias, is its logit.

    As a PNG of one image, as the model saw it, with the map on it; or, with an `Accept` for it, as JSON or `.npy`.
    """
    media_type = chosen_media_type(request, MEDIA_TYPES)
    async with uploaded(request, query) as uploads:
        if media_type == PNG and len(uploads) > 1:
            raise InvalidRequest(
                f"{PNG} shows one image and the request has {len(uploads)}; send one, or accept {JSON} or {NPY}"
            )
        result = await request.state.engine.infer(
            [upload.data for upload in uploads],
            model=query.model,
            size=query.input_size,
            stages=True,
            check=partial(check_class, query.class_id),
            max_wait_seconds=await max_wait_seconds(request),
            timeout_seconds=query.timeout_seconds,
        )
    note(request, result)
    makers: dict[str, Callable[[], bytes]] = {
        PNG: partial(_png, result, query),
        NPY: partial(_npy, uploads, result, query),
        JSON: partial(_json, uploads, result, query, request.state.request_id),
    }
    count = LARGE + 1 if media_type == PNG else numbers(result, stages=[4])  # compressing takes milliseconds
    body = await encoded(request, result.model, makers[media_type], count)
    return Response(body, media_type=media_type)


def _png(result: InferenceResult, query: ExplainQuery) -> bytes:
    (explanation,) = require_all(explain(result, query.class_id), [None])
    return overlay(explanation, query.alpha)


def _npy(uploads: Sequence[Upload], result: InferenceResult, query: ExplainQuery) -> bytes:
    explanations = require_all(explain(result, query.class_id), [upload.filename for upload in uploads], JSON_INSTEAD)
    return encode({"map": maps(explanations)}, NPY, {})


def _json(uploads: Sequence[Upload], result: InferenceResult, query: ExplainQuery, request_id: str) -> bytes:
    """An ExplainResponse."""
    results: list[dict[str, Any]] = []
    for upload, each in zip(uploads, explain(result, query.class_id), strict=True):
        if isinstance(each, ServiceError):
            results.append(image_error(upload.filename, each, request_id))
            continue
        size = {"width": each.inferred.width, "height": each.inferred.height}
        explained = {name: getattr(each, name) for name in _FIELDS}
        results.append({"filename": upload.filename, **size, **explained})
    return json_bytes({"model": result.model, "version": result.version, "size": result.size, "results": results})
