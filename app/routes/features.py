"""`POST /features`."""

import re
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, BaseModel, Field

from app.bodies import Upload
from app.dependencies import require_key
from app.encodings import NPY, NPZ, SAFETENSORS, check_holds, encode, json_bytes, json_chunks
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
from service.errors import ServiceError
from service.postprocess.features import FeatureOptions, features, numbers, stacked
from service.results import InferenceResult

router = APIRouter(tags=[INFERENCE], route_class=InferenceRoute, dependencies=[Depends(require_key)])

MEDIA_TYPES = (JSON, NPZ, SAFETENSORS, NPY)
_STAGES = re.compile(r"[1-4](,[1-4])*")
_EXAMPLE = {"embedding": [-0.2731, 1.204], "stages": {"4": {"shape": [2, 1, 1], "data": [-0.2731, 1.204]}}}


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


class ImageFeatures(ImageInfo):
    """The features of one image; width and height are its own, in pixels, `stages` is by number."""

    embedding: list[float] | None = None
    stages: dict[str, StageMap] | None = None


class FeaturesResponse(BaseModel):
    """The features, in the order of the images."""

    model_config = example(_EXAMPLE, size=[64, 64])

    model: str
    version: str
    size: InputSize
    results: list[ImageFeatures | ImageError]


@router.post(
    "/features",
    operation_id="features",
    summary="Embeddings and feature maps of images",
    response_model=FeaturesResponse,
    **documentation(NPZ, SAFETENSORS, NPY),
)
async def extract(request: Request, query: Annotated[FeaturesQuery, Query()]) -> Response:
    """The embedding of each image, and the feature maps of the requested stages.

    As JSON, or with an `Accept` for it as `.npz`, `.safetensors` or, a single array, as `.npy`. There each array has a
    first axis for the image, and an image that fails fails the request; in JSON its `error` stands in its place.
    """
    media_type, wanted = chosen_media_type(request, MEDIA_TYPES), query.wanted
    check_holds(media_type, wanted.names)
    uploads, result = await infer(request, query, stages=bool(wanted.stages))
    count = numbers(result, wanted)
    if media_type != JSON:
        body = await encoded(request, result, partial(_binary, media_type, uploads, result, wanted), count)
        return Response(body, media_type=media_type)
    chunks = await encoded(request, result, partial(_json, uploads, result, wanted, request.state.request_id), count)
    if len(chunks) == 1:
        return Response(chunks[0], media_type=JSON)
    length = {"content-length": str(sum(map(len, chunks)))}
    return StreamingResponse(_one_by_one(chunks), headers=length, media_type=JSON)  # never copied into one


def _binary(media_type: str, uploads: Sequence[Upload], result: InferenceResult, wanted: FeatureOptions) -> bytes:
    arrays = stacked(result, wanted, [upload.filename for upload in uploads])
    return encode(arrays, media_type, {"model": result.model, "version": result.version})


def _json(uploads: Sequence[Upload], result: InferenceResult, wanted: FeatureOptions, request_id: str) -> list[bytes]:
    """A FeaturesResponse, a large one in several chunks."""
    results = image_results(uploads, result, request_id)
    for entry, image in zip(results, result.results, strict=True):
        if isinstance(image, ServiceError):
            continue
        arrays = features(image.outputs, wanted)
        if wanted.embedding:
            entry["embedding"] = arrays["embedding"]
        if wanted.stages:
            maps = {str(i): arrays[f"stage{i}"] for i in wanted.stages}
            entry["stages"] = {i: {"shape": array.shape, "data": array.ravel()} for i, array in maps.items()}
    content = {"model": result.model, "version": result.version, "size": result.size, "results": results}
    return json_chunks(content) if numbers(result, wanted) > LARGE else [json_bytes(content)]


async def _one_by_one(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
