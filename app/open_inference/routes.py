"""The Open Inference Protocol v2 under `/v2`: the server, its models, inference, and the model repository extension."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version as installed
from itertools import chain
from math import prod
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from app.bodies import JSON_COPIES, LARGE_JSON, parse_json, read_body, timed
from app.caching import cache_use
from app.dependencies import (
    EngineDep,
    HealthDep,
    LivenessDep,
    MaxWaitDep,
    MetricsPageDep,
    require_management,
    require_one_process,
)
from app.disclosure import shown
from app.encodings import json_pieces
from app.open_inference import messages, tensors
from app.open_inference.messages import HEADER_LENGTH, InferRequest, M, Message
from app.open_inference.statistics import Statistics, statistics
from app.open_inference.tensors import TensorMetadata
from app.openapi import BINARY_CONTENT, json_body
from app.problems import ExtensionUnsupported, refusals
from app.routes.inference import (
    BYTES_PER_NUMBER,
    JSON,
    LARGE,
    CancelOnDisconnect,
    answer,
    hold_answer,
    note,
    note_arrival,
)
from app.routes.management import changing
from service.memory import BODIES, Reservation
from service.results import Image, InferenceResult, Size

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
health = APIRouter(prefix="/v2/health", tags=["open inference protocol"])  # for probes, never behind a key
management = APIRouter(
    prefix="/v2/repository/models",
    tags=["management"],
    dependencies=[Depends(require_management), Depends(require_one_process)],
)
_get = partial(router.get, responses=refusals("/v2", 400, 401, 404, 503))

BYTES = "application/octet-stream"
EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]
# Paths of Triton's extensions that this service has not: what they are for, and what to use instead.
ABSENT = {
    "/systemsharedmemory/{rest:path}": "shared memory is not supported; send the tensors' bytes in the request",
    "/cudasharedmemory/{rest:path}": "CUDA shared memory is not supported; send the tensors' bytes in the request",
    "/trace/setting": "traces are not supported; Server-Timing of each response has its times",
    "/models/{name}/trace/setting": "traces are not supported; Server-Timing of each response has its times",
    "/logging": "log settings can't be changed while the service runs; PVT_LOG_FORMAT sets the form of log lines",
}
TYPES = {"UINT8": "TYPE_UINT8", "BYTES": "TYPE_STRING", "FP32": "TYPE_FP32"}
STATES: Mapping[str, Literal["READY", "LOADING"]] = {"ready": "READY", "loading": "LOADING"}
_SHORT = len(str(LARGE_JSON))  # digits of a length that is less

ModelName = Annotated[str, Path(description="`<variant>.<tag>`, or a variant alone.")]
VersionedName = Annotated[str, Path(description="`<variant>.<tag>`, that with `@<version>`, or a variant alone.")]


class ServerMetadata(BaseModel):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """Whether the server is alive."""

    live: bool


class Ready(BaseModel):
    """Whether the server, or a model, is ready."""

    ready: bool


class ModelMetadata(BaseModel):
    """A model: a request has one of `inputs`, the response those of `outputs` that are requested."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class TensorConfig(BaseModel):
    """A tensor; -1 stands for any number. Of a model's inputs, a request has one."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool = False


class ModelConfig(BaseModel):
    """The part of Triton's model configuration that means something here.

    `max_batch_size` 0 says that the first of the dims is the batch: any number of images up to PVT_MAX_IMAGES.
    """

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[TensorConfig]
    output: list[TensorConfig]


class IndexRequest(Message):
    """Which models to list: all, or those that are in memory."""

    ready: bool = False


class IndexEntry(BaseModel):
    """A model of the store; one that is UNAVAILABLE for no reason is loaded by its first request."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


class LoadRequest(Message):
    """How to load a model. No parameter is known: what a model is, is in its card."""

    parameters: Message = Message()


class UnloadParameters(Message):
    """`unload_dependents` changes nothing: no model here depends on another."""

    unload_dependents: bool = False


class UnloadRequest(Message):
    """How to unload a model."""

    parameters: UnloadParameters = UnloadParameters()


@router.get("", summary="Server metadata")
async def server_metadata() -> ServerMetadata:
    """Name, version and extensions."""
    return ServerMetadata(name="pvt-serve", version=installed("pvt-serve"), extensions=EXTENSIONS)


@health.get("/live", summary="Server liveness", response_model=Live, responses={503: {"model": Live}})
async def server_live(state: LivenessDep) -> JSONResponse:
    """200 while the process is alive."""
    return JSONResponse({"live": state.live}, 200 if state.live else 503)


@health.get("/ready", summary="Server readiness", response_model=Ready, responses={503: {"model": Ready}})
async def server_ready(state: HealthDep) -> JSONResponse:
    """200 when the default model, and all that is preloaded, is ready."""
    return JSONResponse({"ready": state.ready}, 200 if state.ready else 503)


# Before the models, none of which has this name.
@_get("/models/stats", summary="Statistics of all models")
async def all_statistics(engine: EngineDep, metrics: MetricsPageDep) -> Statistics:
    """Triton's statistics extension: every model that has inferred since the start."""
    return await statistics(engine, metrics, None, None)


@_get("/models/{name}/stats", summary="Model statistics")
@_get("/models/{name}/versions/{version}/stats", summary="Model statistics")
async def model_statistics(
    engine: EngineDep, metrics: MetricsPageDep, name: ModelName, version: str | None = None
) -> Statistics:
    """Triton's statistics extension, in images and nanoseconds, of all versions of the model and of all workers."""
    return await statistics(engine, metrics, name, version)


@_get("/models/{name}", summary="Model metadata")
@_get("/models/{name}/versions/{version}", summary="Model metadata")
async def model_metadata(engine: EngineDep, name: ModelName, version: str | None = None) -> ModelMetadata:
    """Inputs and outputs, at the model's own input size."""
    model = await engine.model(_versioned(name, version))
    card = model.stored.require_card()
    return ModelMetadata(
        name=model.id,
        versions=[each.version for each in model.versions] or [model.version],
        platform=model.report.backend if model.report else "pytorch",
        inputs=tensors.inputs_of(card),
        outputs=tensors.outputs_of(card),
    )


@_get("/models/{name}/ready", summary="Model readiness")
@_get("/models/{name}/versions/{version}/ready", summary="Model readiness")
async def model_ready(engine: EngineDep, name: ModelName, version: str | None = None) -> Ready:
    """200 when the model is in memory, or its first request will load it."""
    model = await engine.model(_versioned(name, version))
    if model.failure:
        raise model.failure
    return Ready(ready=True)


@_get("/models/{name}/config", summary="Model configuration")
@_get("/models/{name}/versions/{version}/config", summary="Model configuration")
async def model_config(engine: EngineDep, name: ModelName, version: str | None = None) -> ModelConfig:
    """Triton's model configuration extension, which Triton's tools request."""
    model = await engine.model(_versioned(name, version))
    card, platform = model.stored.require_card(), model.report.backend if model.report else "pytorch"
    return ModelConfig(
        name=model.id,
        platform=platform,
        backend=platform,
        max_batch_size=0,
        input=[_config(tensor, optional=True) for tensor in tensors.inputs_of(card)],
        output=[_config(tensor) for tensor in tensors.outputs_of(card)],
    )


def _config(tensor: TensorMetadata, *, optional: bool = False) -> TensorConfig:
    return TensorConfig(name=tensor.name, data_type=TYPES[tensor.datatype], dims=[*tensor.shape], optional=optional)


_BODY = json_body(InferRequest, messages.INFER_EXAMPLES)
_post = partial(
    router.post,
    summary="Inference on tensors",
    response_model=messages.InferResponse,
    responses={
        200: {"content": {BYTES: BINARY_CONTENT}},
        **refusals("/v2", 400, 401, 403, 404, 413, 415, 429, 503, 504),
    },
    openapi_extra={"requestBody": {**_BODY, "content": {**_BODY["content"], BYTES: BINARY_CONTENT}}},
)


@_post("/models/{name}/infer")
@_post("/models/{name}/versions/{version}/infer")
async def infer(
    request: Request, engine: EngineDep, max_wait: MaxWaitDep, name: ModelName, version: str | None = None
) -> Response:
    """Outputs of a model for images in one tensor: `images` (UINT8, NHWC) or `encoded` (BYTES, whole files).

    An image that fails fails the request.
    """
    with engine.request(), engine.memory.reserve(0, BODIES) as held:
        message, found, size = await _read(request, held)
        timeout = message.parameters.timeout
        async with CancelOnDisconnect(request):
            result = await engine.infer(
                found,
                model=_versioned(name, version),
                size=size,
                stages=any(each.name in tensors.STAGES for each in message.outputs),
                check=partial(tensors.check_model, [each.name for each in message.outputs]),
                max_wait_seconds=max_wait,
                timeout_seconds=timeout / 1e6 if timeout else None,
                client=request.state.client,
                held=hold_answer(request),
                cache=cache_use(request),
                admitting=partial(note_arrival, request),
            )
    note(request, result)
    outputs = partial(_outputs, message, result, hold_answer(request))
    head, tails = await engine.encode(outputs) if result.numbers > LARGE else outputs()
    pieces, headers = messages.compressed(chain(head, *tails), request.headers.get("accept-encoding", ""))
    if not tails:
        return await answer(request, result, pieces, result.numbers, JSON, headers=headers)
    headers[HEADER_LENGTH] = str(sum(map(len, head)))
    return await answer(request, result, pieces, result.numbers, BYTES, headers=headers)


@timed
async def _read(request: Request, held: Reservation) -> tuple[InferRequest, list[Image], Size | None]:
    """The request's message, its images, and their input size: None where they are encoded."""
    settings, headers = request.state.settings, request.headers
    raw = await read_body(request, settings.max_body_bytes, held)
    length = headers.get(HEADER_LENGTH)
    held.grow(held.count if length is not None else JSON_COPIES * held.count)
    arguments = (raw, length, settings.max_images)
    # Large JSON on a thread; the bytes of tensors cost nothing.
    at_once = len(raw) < LARGE_JSON or (length is not None and len(length) < _SHORT)
    return _parse(*arguments) if at_once else await run_in_threadpool(_parse, *arguments)


def _parse(raw: bytes, header_length: str | None, max_images: int) -> tuple[InferRequest, list[Image], Size | None]:
    message, tensor = messages.parse(raw, header_length)
    tensors.check_outputs([each.name for each in message.outputs])
    return message, *tensors.images(tensor, max_images)


def _outputs(
    message: InferRequest, result: InferenceResult, held: Reservation
) -> tuple[Iterable[bytes], list[Iterable[bytes]]]:
    """The JSON of the response, and the bytes that follow it for each output that is binary.

    Where some do, the length of the JSON comes first, so it is made at once, and `held` grows by it.
    """
    outputs, tails, numbers = [], [], 0
    vectors = [each.name for each in tensors.outputs_of(result.card) if each.name in tensors.VECTORS]
    for each in message.outputs or [messages.RequestedOutput(name=name) for name in vectors]:
        wish, classes = each.parameters.binary_data, each.parameters.classification or None
        binary = message.parameters.binary_data_output if wish is None else wish
        tensor, tail = tensors.output(result, each.name, classes, binary=binary)
        numbers += 0 if binary else prod(tensor["shape"])
        outputs.append(tensor)
        tails += [tail] * binary
    named = {"id": message.id} if message.id else {}
    head = json_pieces({"model_name": result.model, "model_version": result.version, **named, "outputs": outputs})
    if not tails:
        return head, tails
    held.grow(BYTES_PER_NUMBER * numbers)
    return [*head], tails


def _versioned(name: str, version: str | None) -> str:
    return f"{name}@{version}" if version else name


@router.post("/repository/index", summary="The models of the repository", responses=refusals("/v2", 400, 401, 503))
async def index(request: Request, engine: EngineDep) -> list[IndexEntry]:
    """Every version of every model of the store, and whether it is in memory."""
    wanted = await _read_message(request, IndexRequest)
    entries = [
        IndexEntry(
            name=version.id,
            version=version.version,
            state=STATES.get(version.state, "UNAVAILABLE"),
            reason=shown(request, version.failure or ""),
        )
        for model in await engine.models()
        for version in model.versions
    ]
    return [entry for entry in entries if entry.state == "READY" or not wanted.ready]


@management.post("/{name}/load", summary="Load a model", responses=refusals("/v2", 400, 401, 403, 404, 503, 504))
async def load(request: Request, engine: EngineDep, name: VersionedName) -> Response:
    """Load a model, if it is not in memory; responds when it is."""
    await _read_message(request, LoadRequest)
    async with changing(request, engine, "load", model=name):
        await engine.load(name)
    return Response()


@management.post(
    "/{name}/unload", summary="Unload a model", responses=refusals("/v2", 400, 401, 403, 404, 409, 503, 504)
)
async def unload(request: Request, engine: EngineDep, name: VersionedName) -> Response:
    """Free a model's memory; its next request loads it again."""
    await _read_message(request, UnloadRequest)
    async with changing(request, engine, "unload", model=name):
        await engine.unload(name)
    return Response()


def _absent(reason: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise ExtensionUnsupported(reason)

    return refuse


for path, reason in ABSENT.items():
    router.add_api_route(path, _absent(reason), methods=["GET", "POST"], include_in_schema=False)


async def _read_message(request: Request, form: type[M]) -> M:
    """The body; an absent one is an empty object."""
    with request.state.engine.memory.reserve(0, BODIES) as held:
        body = await read_body(request, request.state.settings.max_body_bytes, held)
    return messages.validated(form, parse_json(body) if body.strip() else {})
