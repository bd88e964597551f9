"""Embeddings and models in OpenAI's form, under `/v1`."""

import base64
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from app.answer_examples import EMBEDDED
from app.bodies import DATA_URL, EXAMPLE, LARGE_JSON, check_count, from_base64, read_body
from app.dependencies import EngineDep
from app.json_body import loads
from app.openapi import json_body
from app.preferences import patience_seconds
from app.refusals import refusals
from app.routes.inference import carried_out, encoded
from service.answers.encodings import json_array, little_endian
from service.errors import InvalidRequest
from service.results import InferenceResult, require_all

router = APIRouter(prefix="/v1", tags=["openai"])


class ImageUrl(BaseModel):
    """Where a picture is."""

    model_config = ConfigDict(extra="forbid")

    url: str
    detail: str | None = None


class ImageInput(BaseModel):
    """A picture, as OpenAI's other endpoints take it."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["image_url"]
    image_url: ImageUrl | str


class EmbeddingsRequest(BaseModel):
    """The body of `POST /v1/embeddings`. `user` is ignored."""

    model_config = ConfigDict(extra="forbid")

    input: Annotated[
        str | ImageInput | list[str | ImageInput],
        Field(description="Pictures as data: URLs, one or several.", examples=[f"data:image/png;base64,{EXAMPLE}"]),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int | None, Field(description="Refused: an embedding has the size it has.")] = None
    user: str | None = None

    @property
    def urls(self) -> list[str]:
        """The data: URLs of all pictures."""
        inputs = self.input if isinstance(self.input, list) else [self.input]
        return [_url(each) for each in inputs]


class Embedding(BaseModel):
    """One picture's embedding; base64 is of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Pictures have no tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """All embeddings, in the order of the pictures."""

    model_config = ConfigDict(json_schema_extra={"examples": [EMBEDDED]})

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
    summary="Embeddings of pictures",
    response_model=EmbeddingsResponse,
    responses=refusals("/v1", 400, 401, 404, 413, 415, 429, 503, 504),
    openapi_extra={
        "requestBody": json_body(EmbeddingsRequest, {"data URL": {"input": f"data:image/png;base64,{EXAMPLE}"}})
    },
)
async def embeddings(request: Request, engine: EngineDep) -> Response:
    """The embedding of each picture; one that fails fails the request."""
    max_wait = await patience_seconds(request)

    def infer(asked: EmbeddingsRequest) -> Any:  # noqa: ANN401  an awaitable
        return engine.infer([from_base64(url) for url in asked.urls], model=asked.model, max_wait_seconds=max_wait)

    asked, answered = await carried_out(request, partial(_read, request), infer)
    body = await encoded(request, answered.model, partial(_body, answered, asked.encoding_format), answered.numbers)
    return Response(body, media_type="application/json")


@router.get("/models", summary="The models of the store", responses=refusals("/v1", 401, 503))
async def models(engine: EngineDep) -> OpenAiModels:
    """As clients of OpenAI's list them."""
    return OpenAiModels(data=[OpenAiModel(id=each.id) for each in await engine.models()])


@router.get("/models/{name}", summary="A model of the store", responses=refusals("/v1", 401, 404, 503))
async def model(engine: EngineDep, name: str) -> OpenAiModel:
    """As clients of OpenAI's ask for one."""
    return OpenAiModel(id=(await engine.model(name)).id)


async def _read(request: Request) -> EmbeddingsRequest:
    settings = request.state.settings
    body = await read_body(request, settings.max_body_bytes)
    asked = _parsed(body) if len(body) < LARGE_JSON else await run_in_threadpool(_parsed, body)
    check_count(len(asked.urls), settings.max_images)
    return asked


def _parsed(body: bytes) -> EmbeddingsRequest:
    try:
        asked = EmbeddingsRequest.model_validate(loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidRequest(f"{'.'.join(map(str, first['loc']))[:200] or 'the body'}: {first['msg']}") from error
    if asked.dimensions is not None:
        raise InvalidRequest("dimensions: the models here were not trained for shortened embeddings; leave it out")
    for i, url in enumerate(asked.urls):
        if not DATA_URL.match(url):
            raise InvalidRequest(
                f"input {i}: {url[:40]!r} is no data: URL with base64; this service embeds pictures, not text"
            )
    return asked


def _url(given: str | ImageInput) -> str:
    if isinstance(given, str):
        return given
    return given.image_url if isinstance(given.image_url, str) else given.image_url.url


def _body(answered: InferenceResult, encoding_format: str) -> bytes:
    """An EmbeddingsResponse."""
    names: Sequence[None] = [None] * len(answered.results)
    data: list[dict[str, Any]] = []
    for i, each in enumerate(require_all(answered.results, names)):
        vector = each.outputs.embedding
        told = json_array(vector) if encoding_format == "float" else base64.b64encode(little_endian(vector)).decode()
        data.append({"object": "embedding", "index": i, "embedding": told})
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return orjson.dumps({"object": "list", "data": data, "model": answered.model, "usage": usage})
