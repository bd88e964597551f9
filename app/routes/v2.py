"""The Open Inference Protocol v2 (KServe's and Triton's), under `/v2`."""

from functools import partial
from importlib.metadata import version as installed
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from app.bodies import LARGE_JSON, check_count, read_body
from app.dependencies import EngineDep, HealthDep, LivenessDep
from app.inference_protocol import (
    HEADER_LENGTH,
    Body,
    InferRequest,
    InferResponse,
    compressed,
    decompressed,
    parse,
    written,
)
from app.problems import documented
from app.routes.inference import carried_out, encoded
from service.listing import ModelStatus
from service.pipeline import Image
from service.residents import Size
from service.results import Answered
from service.tensors import STAGES, VECTORS, Spec, check_outputs, images, input_specs, output, output_specs

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
EXTENSIONS = ("binary_tensor_data", "classification", "model_repository")

ModelName = Annotated[str, Path(description="`<variant>.<tag>`, or a variant alone.")]


class ServerMetadata(BaseModel):
    """What answers."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """Whether the server is alive."""

    live: bool


class Ready(BaseModel):
    """Whether the server, or a model, can be asked."""

    ready: bool


class TensorMetadata(BaseModel):
    """A tensor; -1 stands for any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model: send one of `inputs`, get those of `outputs` that are asked for."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Asked(NamedTuple):
    """A request, read: its message, its pictures, and the input size that they have."""

    message: InferRequest
    pictures: list[Image]
    size: Size | None


@router.get("", summary="Server metadata")
async def server_metadata() -> ServerMetadata:
    """Name, version and extensions."""
    return ServerMetadata(name="pvt-serve", version=installed("pvt-serve"), extensions=list(EXTENSIONS))


@router.get("/health/live", summary="Server liveness", response_model=Live, responses={503: {"model": Live}})
async def server_live(health: LivenessDep) -> JSONResponse:
    """200 while the process is alive."""
    return JSONResponse({"live": health.live}, 200 if health.live else 503)


@router.get("/health/ready", summary="Server readiness", response_model=Ready, responses={503: {"model": Ready}})
async def server_ready(health: HealthDep) -> JSONResponse:
    """200 when the default model, and what is preloaded, answers."""
    return JSONResponse({"ready": health.ready}, 200 if health.ready else 503)


@router.get("/models/{name}", summary="Model metadata", responses=documented(401, 404, 503))
@router.get("/models/{name}/versions/{version}", summary="Model metadata", responses=documented(401, 404, 503))
async def model_metadata(engine: EngineDep, name: ModelName, version: str | None = None) -> ModelMetadata:
    """Inputs and outputs, at the model's own input size."""
    model = await engine.models.one(_named(name, version))
    card = model.stored.require_card()
    return ModelMetadata(
        name=model.stored.id,
        versions=[model.stored.version],
        platform=_platform(model),
        inputs=[_told(spec) for spec in input_specs(card)],
        outputs=[_told(spec) for spec in output_specs(card)],
    )


@router.get(
    "/models/{name}/ready", summary="Model readiness", response_model=Ready, responses=documented(401, 404, 503)
)
@router.get(
    "/models/{name}/versions/{version}/ready",
    summary="Model readiness",
    response_model=Ready,
    responses=documented(401, 404, 503),
)
async def model_ready(engine: EngineDep, name: ModelName, version: str | None = None) -> JSONResponse:
    """200 when the model can be asked: it is in memory, or its first request will load it."""
    model = await engine.models.one(_named(name, version))
    failed = model.status.failure or model.stored.failure
    if failed:
        raise failed
    return JSONResponse({"ready": True})


@router.post(
    "/models/{name}/infer",
    summary="Inference on tensors",
    response_model=InferResponse,
    responses=documented(401, 404, 413, 415, 429, 503, 504),
)
@router.post(
    "/models/{name}/versions/{version}/infer",
    summary="Inference on tensors",
    response_model=InferResponse,
    responses=documented(401, 404, 413, 415, 429, 503, 504),
)
async def infer(request: Request, engine: EngineDep, name: ModelName, version: str | None = None) -> Response:
    """Outputs of a model for pictures in one tensor: `images` (UINT8, NHWC) or `encoded` (BYTES, whole files).

    A picture that fails fails the request.
    """

    def answer(asked: Asked) -> Any:  # noqa: ANN401  an awaitable
        names = [each.name for each in asked.message.outputs]
        return engine.infer(
            asked.pictures,
            model=_named(name, version),
            size=asked.size,
            stages=bool({*names} & {*STAGES}),
            timeout_seconds=asked.message.timeout_seconds,
        )

    asked, answered = await carried_out(request, partial(_read, request), answer)
    made = await encoded(engine, answered.model, partial(_body, asked.message, answered))
    content, headers = compressed(made.content, request.headers.get("accept-encoding", ""))
    if made.header_length is None:
        return Response(content, headers=headers, media_type="application/json")
    headers[HEADER_LENGTH] = str(made.header_length)
    return Response(content, headers=headers, media_type="application/octet-stream")


def _named(name: str, version: str | None) -> str:
    return f"{name}@{version}" if version else name


def _platform(model: ModelStatus) -> str:
    loaded = model.status.loaded
    return loaded.executable.report.backend if loaded else "pytorch"


def _told(spec: Spec) -> TensorMetadata:
    return TensorMetadata(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))


async def _read(request: Request) -> Asked:
    settings, headers = request.state.settings, request.headers
    raw = await read_body(request, settings.max_body_bytes)
    make = partial(_asked, raw, headers.get("content-encoding", ""), headers.get(HEADER_LENGTH),
                   settings.max_body_bytes)  # fmt: skip
    length = headers.get(HEADER_LENGTH, "")
    # JSON, and what is compressed, is read on a thread when it is large; bytes of tensors are not looked at.
    at_once = len(raw) < LARGE_JSON or (
        length.isdecimal() and int(length) < LARGE_JSON and not headers.get("content-encoding")
    )
    asked = make() if at_once else await run_in_threadpool(make)
    check_count(len(asked.pictures), settings.max_images)
    return asked


def _asked(raw: bytes, encoding: str, header_length: str | None, max_bytes: int) -> Asked:
    message, tensor = parse(decompressed(raw, encoding, max_bytes), header_length)
    check_outputs([each.name for each in message.outputs])
    pictures, size = images(tensor)
    return Asked(message, [*pictures], size)


def _body(message: InferRequest, answered: Answered) -> Body:
    everything = message.parameters.binary_data_output
    asked = [
        (each.name, each.parameters.classification or None, each.parameters.binary_data) for each in message.outputs
    ]
    tensors = [
        (output(answered, name, classes), everything if binary is None else binary)
        for name, classes, binary in asked or [(name, None, None) for name in VECTORS]
    ]
    response = {"model_name": answered.model, "model_version": answered.version}
    return written(response | ({"id": message.id} if message.id else {}), tensors)
