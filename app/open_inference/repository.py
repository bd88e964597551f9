"""The Open Inference Protocol's model repository extension, as Triton has it, under `/v2/repository`."""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from app.bodies import parse_json, read_body
from app.dependencies import EngineDep, audited, require_management, require_one_process
from app.disclosure import shown
from app.problems import refusals
from service.errors import InvalidRequest, reasons
from service.lifecycle import time_limit
from service.registry.status import VersionStatus

router = APIRouter(prefix="/v2/repository", tags=["open inference protocol"])
management = APIRouter(
    prefix="/v2/repository/models",
    tags=["management"],
    dependencies=[Depends(require_management), Depends(require_one_process)],
)

M = TypeVar("M", bound=BaseModel)

STATES: Mapping[str, Literal["READY", "LOADING"]] = {"ready": "READY", "loading": "LOADING"}

ModelName = Annotated[str, Path(description="`<variant>.<tag>`, that with `@<version>`, or a variant alone.")]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IndexRequest(_Message):
    """Which models to list: all, or those that are in memory."""

    ready: bool = False


class IndexEntry(BaseModel):
    """A model of the store; one that is UNAVAILABLE for no reason is loaded by its first request."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


class LoadParameters(_Message):
    """None is known: what a model is, is in its card."""


class LoadRequest(_Message):
    """How to load a model."""

    parameters: LoadParameters = LoadParameters()


class UnloadParameters(_Message):
    """`unload_dependents` changes nothing: no model here depends on another."""

    unload_dependents: bool = False


class UnloadRequest(_Message):
    """How to unload a model."""

    parameters: UnloadParameters = UnloadParameters()


@router.post("/index", summary="The models of the repository", responses=refusals("/v2", 400, 401, 503))
async def index(request: Request, engine: EngineDep) -> list[IndexEntry]:
    """Every version of every model of the store, and whether it is in memory."""
    wanted = await _read(request, IndexRequest)
    entries = [_entry(version, request) for model in await engine.models() for version in model.versions]
    return [entry for entry in entries if entry.state == "READY" or not wanted.ready]


@management.post("/{name}/load", summary="Load a model", responses=refusals("/v2", 400, 401, 403, 404, 503, 504))
async def load(request: Request, engine: EngineDep, name: ModelName) -> Response:
    """Load a model, if it is not in memory; responds when it is."""
    await _read(request, LoadRequest)
    with audited(request, engine, "load", model=name):
        async with time_limit(engine.options.timeout_seconds):
            await engine.load(name)
    return Response()


@management.post(
    "/{name}/unload", summary="Unload a model", responses=refusals("/v2", 400, 401, 403, 404, 409, 503, 504)
)
async def unload(request: Request, engine: EngineDep, name: ModelName) -> Response:
    """Free a model's memory; its next request loads it again."""
    await _read(request, UnloadRequest)
    with audited(request, engine, "unload", model=name):
        async with time_limit(engine.options.timeout_seconds):
            await engine.unload(name)
    return Response()


def _entry(version: VersionStatus, request: Request) -> IndexEntry:
    return IndexEntry(
        name=version.id,
        version=version.version,
        state=STATES.get(version.state, "UNAVAILABLE"),
        reason=shown(request, version.failure or ""),
    )


async def _read(request: Request, form: type[M]) -> M:
    """The body; an absent one is an empty object."""
    body = await read_body(request, request.state.settings.max_body_bytes)
    try:
        return form.model_validate(parse_json(body) if body.strip() else {})
    except ValidationError as error:
        raise InvalidRequest(reasons(error, "the body")) from error
