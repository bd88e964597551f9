"""`POST /explain`."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field

from app.bodies import Upload
from app.dependencies import require_key
from app.encodings import NPY, encode, json_bytes
from app.openapi import INFERENCE
from app.routes.inference import (
    JSON,
    LARGE,
    ImageError,
    ImageInfo,
    InferenceQuery,
    InferenceRoute,
    InputSize,
    chosen_media_type,
    documentation,
    encoded,
    example,
    image_results,
    infer,
)
from service.errors import InvalidRequest, ServiceError
from service.postprocess.activation_maps import check_class, explain, maps, numbers, overlay
from service.results import JSON_INSTEAD, InferenceResult, require_all

router = APIRouter(tags=[INFERENCE], route_class=InferenceRoute, dependencies=[Depends(require_key)])

PNG = "image/png"
MEDIA_TYPES = (PNG, JSON, NPY)
_EXAMPLE: dict[str, Any] = {
    "class_id": 7,
    "label": "7",
    "score": 0.9713,
    "logit": 5.5,
    "bias": -0.5,
    "map": [[4.0, 8.0], [5.0, 7.0]],
}


class ExplainQuery(InferenceQuery):
    """Parameters of `POST /explain`."""

    class_id: Annotated[
        int | None, Field(ge=0, description="The class to explain; each image's most likely one if absent.")
    ] = None
    alpha: Annotated[
        float,
        Field(ge=0, le=1, allow_inf_nan=False, description="How opaque the map lies on the image (PNG only)."),
    ] = 0.5


class ImageExplanation(ImageInfo):
    """What speaks for one class where: the mean of `map`, plus `bias`, is `logit`."""

    class_id: int
    label: str
    score: float
    logit: float
    bias: float
    map: Annotated[list[list[float]], Field(description="Rows, top to bottom; a cell is 32 x 32 pixels of the input.")]


class ExplainResponse(BaseModel):
    """The explanations, in the order of the images."""

    model_config = example(_EXAMPLE, size=[64, 64])

    model: str
    version: str
    size: InputSize
    results: list[ImageExplanation | ImageError]


@router.post(
    "/explain",
    operation_id="explain",
    summary="Where in an image a class is seen",
    response_model=ExplainResponse,
    **documentation(PNG, NPY),
)
async def show(request: Request, query: Annotated[ExplainQuery, Query()]) -> Response:
    """The exact class activation map of one class: the mean of its map, plus its bias, is its logit.

    As a PNG of one image, as the model saw it, with the map on it; or, with an `Accept` for it, as JSON or `.npy`.
    """
    media_type = chosen_media_type(request, MEDIA_TYPES)
    uploads, result = await infer(
        request,
        query,
        stages=True,
        check=partial(check_class, query.class_id),
        check_count=partial(_check_count, media_type),
    )
    count = LARGE + 1 if media_type == PNG else numbers(result)  # compressing takes milliseconds
    body = partial(_body, media_type, uploads, result, query, request.state.request_id)
    return Response(await encoded(request, result, body, count), media_type=media_type)


def _check_count(media_type: str, count: int) -> None:
    if media_type == PNG and count > 1:
        raise InvalidRequest(f"{PNG} shows one image and the request has {count}; send one, or accept {JSON} or {NPY}")


def _body(
    media_type: str, uploads: Sequence[Upload], result: InferenceResult, query: ExplainQuery, request_id: str
) -> bytes:
    """A PNG, a `.npy` or, as JSON, an ExplainResponse."""
    explanations = explain(result, query.class_id)
    if media_type == JSON:
        results = image_results(uploads, result, request_id)
        for entry, each in zip(results, explanations, strict=True):
            if not isinstance(each, ServiceError):
                entry |= {name: getattr(each, name) for name in _EXAMPLE}
        return json_bytes({"model": result.model, "version": result.version, "size": result.size, "results": results})
    found = require_all(explanations, [upload.filename for upload in uploads], JSON_INSTEAD)
    return overlay(found[0], query.alpha) if media_type == PNG else encode({"map": maps(found)}, NPY, {})
