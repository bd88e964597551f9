"""Embeddings and models in OpenAI's form, under `/v1`."""

import base64
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from app.bodies import DATA_URL, EXAMPLE, JSON_COPIES, LARGE_JSON, check_count, from_base64, parse_json, read_body
from app.dependencies import EngineDep, MaxWaitDep
from app.encodings import json_array, little_endian
from app.openapi import json_body
from app.problems import refusals
from app.routes.inference import JSON, cancel_on_disconnect, encoded, note
from service.errors import InvalidRequest
from service.memory import BODIES
from service.results import InferenceResult, require_all

router = APIRouter(prefix="/v1", tags=["openai"])

_NO_TOKENS = {"prompt_tokens": 0, "total_tokens": 0}


class ImageUrl(BaseModel, extra="forbid"):
    """The URL of an image."""

    url: str
    detail: str | None = None


class ImageInput(BaseModel, extra="forbid"):
    """An image, in the form of OpenAI's other endpoints."""

    type: Literal["image_url"]
    image_url: ImageUrl | str


class EmbeddingsRequest(BaseModel, extra="forbid"):
    """The body of `POST /v1/embeddings`. `user` is ignored."""

    input: Annotated[
        str | ImageInput | list[str | ImageInput],
        Field(description="Images as data: URLs, one or several.", examples=[f"data:image/png;base64,{EXAMPLE}"]),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int | None, Field(description="Refused: embeddings can't be shortened.")] = None
    user: str | None = None

    @property
    def urls(self) -> list[str]:
        """The data: URLs of all images."""
        inputs = self.input if isinstance(self.input, list) else [self.input]
        urls = [each.image_url if isinstance(each, ImageInput) else each for each in inputs]
        return [each.url if isinstance(each, ImageUrl) else each for each in urls]


class Embedding(BaseModel):
    """One image's embedding; base64 is of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Images have no tokens."""

    prompt_tokens: int
    total_tokens: int


_EXAMPLE: dict[str, Any] = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [-0.2731, 1.204]}],
    "model": "pvt_v2_b0.digits",
    "usage": {**_NO_TOKENS},
}


class EmbeddingsResponse(BaseModel, json_schema_extra={"examples": [_EXAMPLE]}):
    """All embeddings, in the order of the images."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class OpenAiModel(BaseModel):
    """A model of the store."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "pvt-serve"


class OpenAiModels(BaseModel):
    """Every model of the store."""

    object: Literal["list"] = "list"
    data: list[OpenAiModel]


@router.post(
    "/embeddings",
    summary="Embeddings of images",
    response_model=EmbeddingsResponse,
    responses=refusals("/v1", 400, 401, 404, 413, 415, 429, 503, 504),
    openapi_extra={
        "requestBody": json_body(EmbeddingsRequest, {"data URL": {"input": f"data:image/png;base64,{EXAMPLE}"}})
    },
)
async def embeddings(request: Request, engine: EngineDep, max_wait: MaxWaitDep) -> Response:
    """The embedding of each image; one that fails fails the request."""
    settings = request.state.settings
    with engine.request(), engine.memory.reserve(0, BODIES) as held:
        body = await read_body(request, settings.max_body_bytes, held)
        held.grow(JSON_COPIES * len(body))
        message = _parse(body) if len(body) < LARGE_JSON else await run_in_threadpool(_parse, body)
        check_count(len(message.urls), settings.max_images)
        async with cancel_on_disconnect(request):
            images = [from_base64(url) for url in message.urls]
            result = await engine.infer(
                images, model=message.model, max_wait_seconds=max_wait, client=request.state.client
            )
    note(request, result)
    content = await encoded(request, result, partial(_content, result, message.encoding_format), result.numbers)
    return Response(content, media_type=JSON)


@router.get("/models", summary="The models of the store", responses=refusals("/v1", 401, 503))
async def models(engine: EngineDep) -> OpenAiModels:
    """As clients of OpenAI's list them."""
    return OpenAiModels(data=[OpenAiModel(id=each.id) for each in await engine.models()])


@router.get("/models/{name}", summary="A model of the store", responses=refusals("/v1", 401, 404, 503))
async def model(engine: EngineDep, name: str) -> OpenAiModel:
    """As clients of OpenAI's ask for one."""
    return OpenAiModel(id=(await engine.model(name)).id)


def _parse(body: bytes) -> EmbeddingsRequest:
    try:
        message = EmbeddingsRequest.model_validate(parse_json(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidRequest(f"{'.'.join(map(str, first['loc']))[:200] or 'the body'}: {first['msg']}") from error
    if message.dimensions is not None:
        raise InvalidRequest("dimensions: the models here were not trained for shortened embeddings; leave it out")
    for i, url in enumerate(message.urls):
        if not DATA_URL.match(url):
            raise InvalidRequest(
                f"input {i}: {url[:40]!r} is no data: URL with base64; this service embeds images, not text"
            )
    return message


def _content(result: InferenceResult, encoding_format: str) -> bytes:
    """An EmbeddingsResponse."""
    data: list[dict[str, Any]] = []
    for i, each in enumerate(require_all(result.results, [None] * len(result.results))):
        vector = each.outputs.embedding
        content = json_array(vector) if encoding_format == "float" else base64.b64encode(little_endian(vector)).decode()
        data.append({"object": "embedding", "index": i, "embedding": content})
    return orjson.dumps({"object": "list", "data": data, "model": result.model, "usage": _NO_TOKENS})
