"""Models in the Open Inference Protocol v2: their inputs and outputs, whether they are ready, how they run."""

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from app.dependencies import EngineDep
from app.open_inference.tensors import Spec, input_specs, output_specs
from app.problems import refusals

router = APIRouter(prefix="/v2/models", tags=["open inference protocol"])

TYPES = {"UINT8": "TYPE_UINT8", "BYTES": "TYPE_STRING", "FP32": "TYPE_FP32"}

ModelName = Annotated[str, Path(description="`<variant>.<tag>`, or a variant alone.")]


class Ready(BaseModel):
    """Whether the server, or a model, is ready."""

    ready: bool


class TensorMetadata(BaseModel):
    """A tensor; -1 stands for any number."""

    name: str
    datatype: str
    shape: list[int]


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


@router.get("/{name}", summary="Model metadata", responses=refusals("/v2", 400, 401, 404, 503))
@router.get("/{name}/versions/{version}", summary="Model metadata", responses=refusals("/v2", 400, 401, 404, 503))
async def model_metadata(engine: EngineDep, name: ModelName, version: str | None = None) -> ModelMetadata:
    """Inputs and outputs, at the model's own input size."""
    model = await engine.model(named(name, version))
    card = model.stored.require_card()
    return ModelMetadata(
        name=model.id,
        versions=[each.version for each in model.versions] or [model.version],
        platform=model.report.backend if model.report else "pytorch",
        inputs=[_metadata(spec) for spec in input_specs(card)],
        outputs=[_metadata(spec) for spec in output_specs(card)],
    )


@router.get(
    "/{name}/ready", summary="Model readiness", response_model=Ready, responses=refusals("/v2", 400, 401, 404, 503)
)
@router.get(
    "/{name}/versions/{version}/ready",
    summary="Model readiness",
    response_model=Ready,
    responses=refusals("/v2", 400, 401, 404, 503),
)
async def model_ready(engine: EngineDep, name: ModelName, version: str | None = None) -> JSONResponse:
    """200 when the model is in memory, or its first request will load it."""
    model = await engine.model(named(name, version))
    if model.failure:
        raise model.failure
    return JSONResponse({"ready": True})


@router.get("/{name}/config", summary="Model configuration", responses=refusals("/v2", 400, 401, 404, 503))
@router.get(
    "/{name}/versions/{version}/config",
    summary="Model configuration",
    responses=refusals("/v2", 400, 401, 404, 503),
)
async def model_config(engine: EngineDep, name: ModelName, version: str | None = None) -> ModelConfig:
    """Triton's model configuration extension, which Triton's tools request."""
    model = await engine.model(named(name, version))
    card, platform = model.stored.require_card(), model.report.backend if model.report else "pytorch"
    return ModelConfig(
        name=model.id,
        platform=platform,
        backend=platform,
        max_batch_size=0,
        input=[_configured(spec, optional=True) for spec in input_specs(card)],
        output=[_configured(spec) for spec in output_specs(card)],
    )


def named(name: str, version: str | None) -> str:
    """The engine's name for this version of a model."""
    return f"{name}@{version}" if version else name


def _metadata(spec: Spec) -> TensorMetadata:
    return TensorMetadata(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))


def _configured(spec: Spec, *, optional: bool = False) -> TensorConfig:
    return TensorConfig(name=spec.name, data_type=TYPES[spec.datatype], dims=list(spec.shape), optional=optional)
