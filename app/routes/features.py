"""`POST /features`."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from app.bodies import Upload
from app.dependencies import max_wait_seconds, require_key
from app.encodings import NPY, NPZ, SAFETENSORS, check_holds, encode, json_bytes, json_chunks
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
from service.errors import ServiceError
from service.postprocess import FeatureOptions, features, numbers, stacked
from service.results import InferenceResult

router = APIRouter(tags=[INFERENCE], route_class=InferenceRoute, dependencies=[Depends(require_key)])

MEDIA_TYPES = (JSON, NPZ, SAFETENSORS, NPY)
_STAGES = re.compile(r"[1-4](,[1-4])*")
_EXAMPLE: dict[str, Any] = {
    "embedding": [-0.2731, 1.204],
    "stages": {"4": {"shape": [2, 1, 1], "data": [-0.2731, 1.204]}},
}


def _are_stages(value: str) -> str:
    if value and (not _STAGES.fullmatch(value) or len({*value.split(",")}) < len(value.split(","))):
        raise ValueError("must be different numbers from 1 to 4, separated by commas, such as 1,4")
    return value


class FeaturesQuery(InferenceQuery):
    """Parameters of `POST /features`."""

    embedding: Annotated[bool, Field(description="Whether the response has the embedding.")] = True
    stages: Annotated[
        str,
        AfterValidator(_are_stages),
        Field(description="Stages whose feature maps to return, such as `1,4`; their strides are 4, 8, 16 and 32."),
    ] = ""
    pool: Annotated[
        Literal["avg", "none"], Field(description="`avg`: the mean of each map over its positions, not the map.")
    ] = "none"
    normalize: Annotated[
        bool, Field(description="Scale each vector of channels, in a map the one at each position, to length 1.")
    ] = False
    dtype: Annotated[
        Literal["float32", "float16"], Field(description="Of the numbers; float16 halves the binary forms.")
    ] = "float32"

    @property
    def wanted(self) -> FeatureOptions:
        """The same, as the engine's."""
        stages = tuple(int(stage) for stage in self.stages.split(",") if stage)
        return FeatureOptions(self.embedding, stages, self.pool, self.normalize, self.dtype)


class StageMap(BaseModel):
    """A feature map: `shape` is channels, height, width, or channels alone; `data` is flat, the last axis fastest."""

    shape: list[int]
    data: list[float]


class ImageFeatures(BaseModel):
    """The features of one image; width and height are its own, in pixels, `stages` is by number."""

    filename: str | None
    width: int
    height: int
    embedding: list[float] | None = None
    stages: dict[str, StageMap] | None = None


class FeaturesResponse(BaseModel):
    """The features, in the order of the images."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{**EXAMPLE_MODEL, "size": [64, 64], "results": [{**EXAMPLE_IMAGE, **_EXAMPLE}]}]
        }
    )

    model: str
    version: str
    size: InputSize
    results: list[ImageFeatures | ImageError]


class ChunkedResponse(Response):
    """A response whose body is `chunks`, with their length in the head, so that a large one is never copied into one.

    Each chunk waits until the client has taken more.
    """

    def __init__(self, chunks: Sequence[bytes], media_type: str) -> None:
        super().__init__(None, headers={"content-length": str(sum(map(len, chunks)))}, media_type=media_type)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI's signature
        """See the ASGI specification."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@router.post(
    "/features",
    operation_id="features",
    summary="Embeddings and feature maps of images",
    response_model=FeaturesResponse,
    responses={
        200: {"content": dict.fromkeys(MEDIA_TYPES[1:], BINARY_CONTENT)},
        **documented(406, *IMAGE_PROBLEMS),
    },
    openapi_extra={"requestBody": IMAGES},
)
async def extract(request: Request, query: Annotated[FeaturesQuery, Query()]) -> Response:
    """The embedding of each image, and the feature maps of the requested stages.

    As JSON, or with an `Accept` for it as `.npz`, `.safetensors` or, a single array, as `.npy`. There each array has a
    first axis for the image, and an image that fails fails the request; in JSON its `error` stands in its place.
    """
    media_type, wanted = chosen_media_type(request, MEDIA_TYPES), query.wanted
    check_holds(media_type, wanted.names)
    async with uploaded(request, query) as uploads:
        result = await request.state.engine.infer(
            [upload.data for upload in uploads],
            model=query.model,
            size=query.input_size,
            stages=bool(wanted.stages),
            max_wait_seconds=await max_wait_seconds(request),
            timeout_seconds=query.timeout_seconds,
        )
    note(request, result)
    count = numbers(result, wanted.stages)
    make: Callable[[], Response]
    if media_type == JSON:
        make = partial(_json, uploads, result, wanted, request.state.request_id, large=count > LARGE)
    else:
        make = partial(_binary, uploads, result, wanted, media_type)
    return await encoded(request, result.model, make, count)


def _json(
    uploads: Sequence[Upload], result: InferenceResult, wanted: FeatureOptions, request_id: str, *, large: bool
) -> Response:
    """A FeaturesResponse."""
    results: list[dict[str, Any]] = []
    for upload, each in zip(uploads, result.results, strict=True):
        if isinstance(each, ServiceError):
            results.append(image_error(upload.filename, each, request_id))
            continue
        arrays = features(each.outputs, wanted)
        body: dict[str, Any] = {"filename": upload.filename, "width": each.width, "height": each.height}
        if wanted.embedding:
            body["embedding"] = arrays["embedding"]
        if wanted.stages:
            maps = {str(i): arrays[f"stage{i}"] for i in wanted.stages}
            body["stages"] = {i: {"shape": array.shape, "data": array.ravel()} for i, array in maps.items()}
        results.append(body)
    content = {"model": result.model, "version": result.version, "size": result.size, "results": results}
    return ChunkedResponse(json_chunks(content), JSON) if large else Response(json_bytes(content), media_type=JSON)


def _binary(uploads: Sequence[Upload], result: InferenceResult, wanted: FeatureOptions, media_type: str) -> Response:
    arrays = stacked(result, wanted, [upload.filename for upload in uploads])
    content = encode(arrays, media_type, {"model": result.model, "version": result.version})
    return Response(content, media_type=media_type)
