"""The Open Inference Protocol v2 under `/v2`: the server, its health, and inference."""

from functools import partial
from importlib.metadata import version as installed
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from app.bodies import LARGE_JSON, read_body
from app.dependencies import EngineDep, HealthDep, LivenessDep, MaxWaitDep
from app.open_inference.messages import (
    HEADER_LENGTH,
    INFER_EXAMPLES,
    InferRequest,
    InferResponse,
    compressed,
    decompressed,
    parse,
    serialize,
)
from app.open_inference.models import ModelName, Ready, named
from app.open_inference.tensors import STAGES, VECTORS, check_outputs, images, output
from app.openapi import BINARY_CONTENT, json_body
from app.problems import refusals
from app.routes.inference import JSON, cancel_on_disconnect, encoded, note
from service.results import Image, InferenceResult, Size

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
health = APIRouter(prefix="/v2/health", tags=["open inference protocol"])  # for probes, never behind a key
SHORT = len(str(LARGE_JSON))  # digits of a length that is less
BYTES = "application/octet-stream"
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository")

INFER: dict[str, Any] = {
    "summary": "Inference on tensors",
    "response_model": InferResponse,
    "responses": {
        200: {"content": {BYTES: BINARY_CONTENT}},
        **refusals("/v2", 400, 401, 404, 413, 415, 429, 503, 504),
    },
    "openapi_extra": {"requestBody": json_body(InferRequest, INFER_EXAMPLES)},
}
INFER["openapi_extra"]["requestBody"]["content"][BYTES] = BINARY_CONTENT


class ServerMetadata(BaseModel):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """Whether the server is alive."""

    live: bool


class ParsedRequest(NamedTuple):
    """A request: its message, its images, and their input size; None where they are encoded."""

    message: InferRequest
    images: list[Image]
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
    """200 when the default model, and all that is preloaded, is ready."""
    return JSONResponse({"ready": state.ready}, 200 if state.ready else 503)


@router.post("/models/{name}/infer", **INFER)
@router.post("/models/{name}/versions/{version}/infer", **INFER)
async def infer(
    request: Request, engine: EngineDep, max_wait: MaxWaitDep, name: ModelName, version: str | None = None
) -> Response:
    """Outputs of a model for images in one tensor: `images` (UINT8, NHWC) or `encoded` (BYTES, whole files).

    An image that fails fails the request.
    """
    with engine.request():
        parsed = await _read(request)
        outputs = [each.name for each in parsed.message.outputs]
        async with cancel_on_disconnect(request):
            result = await engine.infer(
                parsed.images,
                model=named(name, version),
                size=parsed.size,
                stages=bool({*outputs} & {*STAGES}),
                max_wait_seconds=max_wait,
                timeout_seconds=parsed.message.timeout_seconds,
            )
    note(request, result)
    make = partial(_response, parsed.message, result, request.headers.get("accept-encoding", ""))
    return await encoded(request, result, make, result.numbers)


async def _read(request: Request) -> ParsedRequest:
    settings, headers = request.state.settings, request.headers
    raw = await read_body(request, settings.max_body_bytes)
    length, encoding = headers.get(HEADER_LENGTH), headers.get("content-encoding", "")
    make = partial(_parse, raw, encoding, length, settings.max_body_bytes, settings.max_images)
    # Large JSON, and all that is compressed, on a thread; the bytes of tensors cost nothing.
    at_once = not encoding and (len(raw) < LARGE_JSON or (length is not None and len(length) < SHORT))
    return make() if at_once else await run_in_threadpool(make)


def _parse(raw: bytes, encoding: str, header_length: str | None, max_bytes: int, max_images: int) -> ParsedRequest:
    message, tensor = parse(decompressed(raw, encoding, max_bytes), header_length)
    check_outputs([each.name for each in message.outputs])
    found, size = images(tensor, max_images)
    return ParsedRequest(message, [*found], size)


def _response(message: InferRequest, result: InferenceResult, accepted: str) -> Response:
    everything = message.parameters.binary_data_output
    requested = [
        (each.name, each.parameters.classification or None, each.parameters.binary_data) for each in message.outputs
    ]
    tensors = [
        (output(result, name, classes), everything if binary is None else binary)
        for name, classes, binary in requested or [(name, None, None) for name in VECTORS]
    ]
    head = {"model_name": result.model, "model_version": result.version}
    body = serialize(head | ({"id": message.id} if message.id else {}), tensors)
    content, headers = compressed(body.content, accepted)
    if body.header_length is None:
        return Response(content, headers=headers, media_type=JSON)
    headers[HEADER_LENGTH] = str(body.header_length)
    return Response(content, headers=headers, media_type=BYTES)
