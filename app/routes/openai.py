"""Embeddings and models in OpenAI's form, under `/v1`."""

import base64
import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BaseModel, Field, SkipValidation, ValidationError

from app.bodies import EXAMPLE, Link, Upload, parse_json, read_json
from app.dependencies import EngineDep
from app.encodings import json_array, little_endian
from app.json_images import image_of
from app.openapi import json_body
from app.problems import TooManyImages, refusals
from app.routes.inference import JSON, InferenceQuery, encoded, infer_images
from service.architecture.variants import VARIANTS
from service.errors import InvalidRequest, reasons
from service.memory import BODIES
from service.postprocess import FeatureOptions, feature
from service.registry.versions import ModelStatus
from service.results import InferenceResult, require_all
from service.store.cards import ModelCard

router = APIRouter(prefix="/v1", tags=["openai"])

_NO_TOKENS = {"prompt_tokens": 0, "total_tokens": 0}
_URL = re.compile(r"\s{0,99}(data:|[a-z][a-z0-9+.-]{0,20}://)", re.IGNORECASE)


class ImageUrl(BaseModel):
    """The URL of an image; `detail` is ignored."""

    url: str
    detail: str | None = None


class ImageUrlInput(BaseModel):
    """An image, in the form of OpenAI's other endpoints."""

    type: Literal["image_url"]
    image_url: ImageUrl | str


class ImageInput(BaseModel):
    """An image, in Jina's form: base64, a `data:` URL or an address."""

    image: str


class EmbeddingsRequest(BaseModel):
    """The body of `POST /v1/embeddings`. Other members, such as `user`, are ignored."""

    input: Annotated[
        SkipValidation[str | ImageUrlInput | ImageInput | list[str | ImageUrlInput | ImageInput]],
        Field(
            description="Images, one or several: `data:` URLs, and addresses where PVT_URL_HOSTS allows them.",
            examples=[f"data:image/png;base64,{EXAMPLE}"],
        ),
    ]
    model: str | None = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None, Field(validation_alias=AliasChoices("encoding_format", "embedding_type"))
    ] = None
    dimensions: Annotated[int | None, Field(description="Only the model's own: embeddings can't be shortened.")] = None
    modality: Annotated[
        Literal["image", "auto"] | None, Field(description="With `image` a string of `input` may be plain base64.")
    ] = None
    normalize: Annotated[
        bool | None,
        Field(
            validation_alias=AliasChoices("normalize", "normalized"),
            description="Scale each embedding to a length of 1.",
        ),
    ] = None


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


class ModelEntry(BaseModel):
    """A model of the store: `name` and `ready` are KServe's, the others OpenAI's."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "pvt-serve"
    name: str
    ready: Annotated[bool, Field(description="Whether it is in memory, or its first request will load it.")]


class ModelEntries(BaseModel):
    """Every model of the store: `data` for clients of OpenAI, their names in `models` for KServe's."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
    models: list[str]


@router.post(
    "/embeddings",
    summary="Embeddings of images",
    response_model=EmbeddingsResponse,
    responses=refusals("/v1", 400, 401, 403, 404, 413, 415, 429, 502, 503, 504),
    openapi_extra={
        "requestBody": json_body(EmbeddingsRequest, {"data URL": {"input": f"data:image/png;base64,{EXAMPLE}"}})
    },
)
async def embeddings(request: Request, engine: EngineDep) -> Response:
    """The embedding of each image; one that fails fails the request."""
    with engine.request(), engine.memory.reserve(0, BODIES) as held:
        message, images = await read_json(request, held, partial(_parse, max_images=request.state.settings.max_images))
        check, query = partial(_check_dimensions, message), InferenceQuery(model=message.model)
        _, result = await infer_images(request, query, images, held, check=check)
    content = await encoded(request, result, partial(_content, result, message), result.numbers)
    return Response(content, media_type=JSON)


@router.get("/models", summary="The models of the store", responses=refusals("/v1", 401, 503))
async def models(engine: EngineDep) -> ModelEntries:
    """As clients of OpenAI's and of KServe's list them."""
    entries = [_entry(each) for each in await engine.models()]
    return ModelEntries(data=entries, models=[each.name for each in entries])


@router.get("/models/{name}", summary="A model of the store", responses=refusals("/v1", 401, 404, 503))
async def model(engine: EngineDep, name: str) -> ModelEntry:
    """As clients of OpenAI's ask for one, and KServe's whether it is ready: 503 where it can't be loaded."""
    found = await engine.model(name)
    if found.failure:
        raise found.failure
    return _entry(found)


def _entry(found: ModelStatus) -> ModelEntry:
    return ModelEntry(id=found.id, name=found.id, ready=found.failure is None)


def _parse(body: bytes, max_images: int) -> tuple[EmbeddingsRequest, list[Upload | Link]]:
    """The message, and its images; by hand, up to the first mistake: a validator would list a million wrong items."""
    try:
        message = EmbeddingsRequest.model_validate(parse_json(body))
    except ValidationError as error:
        raise InvalidRequest(reasons(error, "the body")) from error
    items = message.input if isinstance(message.input, list) else [message.input]
    _check_items(items, max_images)
    return message, [_image(item, i, message.modality) for i, item in enumerate(items)]


def _check_items(items: Sequence[Any], max_images: int) -> None:
    """Raises InvalidRequest for no image, too many, and token ids: a list of integers, or one for each text."""
    first = next(iter(items), None)
    if isinstance(first[0] if isinstance(first, list) and first else first, int):
        raise InvalidRequest(
            "input: these are token ids of a text, which some clients send in place of strings; the models here see "
            "images. Send data: URLs as they are: in LangChain OpenAIEmbeddings(check_embedding_ctx_length=False)"
        )
    if not items:
        raise InvalidRequest("input: an empty list; send at least one image")
    if len(items) > max_images:
        raise TooManyImages(
            f"input: {len(items)} images; PVT_MAX_IMAGES allows {max_images} in one request; in LangChain "
            f"OpenAIEmbeddings(chunk_size={max_images})"
        )


def _image(item: object, index: int, modality: str | None) -> Upload | Link:
    place = f"input {index}"
    if isinstance(item, str) and modality != "image" and not _URL.match(item):
        raise InvalidRequest(
            f"{place}: {item[:40]!r} is no data: URL; the models here embed images, not text. Send "
            '\'data:image/jpeg;base64,...\', or base64 as {"image": "..."}'
        )
    return image_of(item, place)


def _check_dimensions(message: EmbeddingsRequest, card: ModelCard) -> None:
    own = VARIANTS[card.variant].embed_dims[-1]
    if message.dimensions not in (None, own):
        raise InvalidRequest(
            f"dimensions: the embeddings of {card.id} have {own} numbers, and it was not trained for shortened ones; "
            f"leave it out, or send {own}"
        )


def _content(result: InferenceResult, message: EmbeddingsRequest) -> bytes:
    """An EmbeddingsResponse."""
    data: list[dict[str, Any]] = []
    wanted = FeatureOptions(normalize=bool(message.normalize))
    for i, each in enumerate(require_all(result.results, [None] * len(result.results))):
        vector = feature(each.outputs, "embedding", wanted)
        in_base64 = message.encoding_format == "base64"
        content = base64.b64encode(little_endian(vector)).decode() if in_base64 else json_array(vector)
        data.append({"object": "embedding", "index": i, "embedding": content})
    return orjson.dumps({"object": "list", "data": data, "model": result.model, "usage": _NO_TOKENS})
