"""The Open Inference Protocol v2 (KServe's and Triton's), under `/v2`."""

from functools import partial
from importlib.metadata import version as installed
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from app.bodies import LARGE_JSON, read_body
from app.dependencies import EngineDep, HealthDep, LivenessDep
from app.inference_protocol import (
    HEADER_LENGTH,
    INFER_EXAMPLES,
    Body,
    InferRequest,
    InferResponse,
    compressed,
    decompressed,
    parse,
    written,
)
from app.openapi import BINARY, json_body
from app.preferences import patience_seconds
from app.refusals import refusals
from app.routes.inference import carried_out, encoded
from app.routes.v2_models import ModelName, Ready, named
from service.answers.tensors import STAGES, VECTORS, check_outputs, images, output
from service.results import Image, InferenceResult, Size

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
health = APIRouter(prefix="/v2/health", tags=["open inference protocol"])  # what probes ask, never behind a key
SHORT = len(str(LARGE_JSON))  # digits of a length that is less
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository")


INFER_RESPONSES = {
    200: {"content": {"application/octet-stream": {"schema": BINARY}}},
    **refusals("/v2", 400, 401, 404, 413, 415, 429, 503, 504),
}
INFER_BODY = {"requestBody": json_body(InferRequest, INFER_EXAMPLES)}
INFER_BODY["requestBody"]["content"]["application/octet-stream"] = {"schema": BINARY}


class ServerMetadata(BaseModel):
    """What answers."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """Whether the server is alive."""

    live: bool


class Asked(NamedTuple):
    """A request, read: its message, its pictures, and the input size that they have."""

    message: InferRequest
    pictures: list[Image]
    size: Size | None


@router.get("", summary="Server metadata")
async def server_metadata() -> ServerMetadata:
    """Name, version and extensions."""
    return ServerMetadata(name="pvt-serve", version=installed("pvt-serve"), extensions=list(EXTENSIONS))


@health.get("/live", summary="Server liveness", response_model=Live, responses={503: {"model": Live}})
async def server_live(state: LivenessDep) -> JSONResponse:
    """200 while the process is alive."""
    return JSONResponse({"live": state.live}, 200 if state.live else 503)


@health.get("/ready", summary="Server readiness", response_model=Ready, responses={503: {"model": Ready}})
async def server_ready(state: HealthDep) -> JSONResponse:
    """200 when the default model, and what is preloaded, answers."""
    return JSONResponse({"ready": state.ready}, 200 if state.ready else 503)


@router.post(
    "/models/{name}/infer",
    summary="Inference on tensors",
    response_model=InferResponse,
    responses=INFER_RESPONSES,
    openapi_extra=INFER_BODY,
)
@router.post(
    "/models/{name}/versions/{version}/infer",
    summary="Inference on tensors",
    response_model=InferResponse,
    responses=INFER_RESPONSES,
    openapi_extra=INFER_BODY,
)
async def infer(request: Request, engine: EngineDep, name: ModelName, version: str | None = None) -> Response:
    """Outputs of a model for pictures in one tensor: `images` (UINT8, NHWC) or `encoded` (BYTES, whole files).

    A picture that fails fails the request.
    """
    max_wait = await patience_seconds(request)

    def answer(asked: Asked) -> Any:  # noqa: ANN401  an awaitable
        names = [each.name for each in asked.message.outputs]
        return engine.infer(
            asked.pictures,
            model=named(name, version),
            size=asked.size,
            stages=bool({*names} & {*STAGES}),
            max_wait_seconds=max_wait,
            timeout_seconds=asked.message.timeout_seconds,
        )

    asked, answered = await carried_out(request, partial(_read, request), answer)
    make = partial(_response, asked.message, answered, request.headers.get("accept-encoding", ""))
    return await encoded(request, answered.model, make, answered.numbers)


async def _read(request: Request) -> Asked:
    settings, headers = request.state.settings, request.headers
    raw = await read_body(request, settings.max_body_bytes)
    length, encoding = headers.get(HEADER_LENGTH), headers.get("content-encoding", "")
    make = partial(_asked, raw, encoding, length, settings.max_body_bytes, settings.max_images)
    # Large JSON, and all that is compressed, on a thread; the bytes of tensors are not looked at.
    at_once = not encoding and (len(raw) < LARGE_JSON or (length is not None and len(length) < SHORT))
    return make() if at_once else await run_in_threadpool(make)


def _asked(raw: bytes, encoding: str, header_length: str | None, max_bytes: int, max_images: int) -> Asked:
    message, tensor = parse(decompressed(raw, encoding, max_bytes), header_length)
    check_outputs([each.name for each in message.outputs])
    pictures, size = images(tensor, max_images)
    return Asked(message, [*pictures], size)


def _response(message: InferRequest, answered: InferenceResult, accepted: str) -> Response:
    made = _body(message, answered)
    content, headers = compressed(made.content, accepted)
    if made.header_length is None:
        return Response(content, headers=headers, media_type="application/json")
    headers[HEADER_LENGTH] = str(made.header_length)
    return Response(content, headers=headers, media_type="application/octet-stream")


def _body(message: InferRequest, answered: InferenceResult) -> Body:
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
