"""What changes the models in memory and the aliases of the store, and shows the scheduler; for those who run it all."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError

from app.bodies import parse_json, read_json
from app.dependencies import APPLIED, EngineDep, MaxWaitDep, audited, require_management, require_one_process
from app.openapi import json_body
from app.problems import documented
from app.routes.models import BatchSize, ModelInfo, ModelList, milliseconds, model_info
from app.strict import Strict
from service.engine import Engine, TimeLimit
from service.errors import ModelLoading
from service.memory import BODIES
from service.scheduling.lanes import QueueActivity, Release

router = APIRouter(tags=["management"], dependencies=[Depends(require_management)])
_models = APIRouter(prefix="/models", dependencies=[Depends(require_one_process)])
_post = partial(_models.post, response_model_exclude_none=True)

ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": ModelInfo, "description": "It is on its way (`Prefer: respond-async`, or `wait` ended)."}
}
CHANGED = documented(401, 403, 404, 422, 503)


class AliasTarget(Strict):
    """What an alias is to stand for."""

    model: Annotated[
        str, Field(description="`<variant>.<tag>` or `<variant>.<tag>@<version>`.", examples=["pvt_v2_b0.digits@1"])
    ]


def _target(body: bytes) -> AliasTarget:
    try:
        return AliasTarget.model_validate(parse_json(body))
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error


class AliasList(BaseModel):
    """Every alias of the store, and what it stands for."""

    aliases: dict[str, str]


class QueueInfo(BaseModel):
    """One model's queue, in images; see `GET /stats` for the states."""

    model: str
    waiting_decode: int
    decoding: int
    queued: int
    running: int
    admitted: Annotated[int, Field(description="Places taken, from admission to result; never more than `capacity`.")]
    capacity: int
    virtual_seconds: Annotated[
        float, Field(description="Instance time it was given so far; of queues that wait, the least is served first.")
    ]
    batch_plan: list[BatchSize]


class InstanceInfo(BaseModel):
    """One instance; model, size, alone and ms describe the batch that it runs, and for how long."""

    instance: int
    busy: bool
    model: str | None = None
    size: int | None = None
    alone: bool | None = None
    ms: float | None = None


class ReleaseInfo(BaseModel):
    """A batch that was released to an instance."""

    seconds_ago: float
    model: str
    reason: Annotated[
        Literal["idle", "full", "delay"],
        Field(description="An idle instance took what there was; the batch was full; its delay had passed."),
    ]
    size: int
    instance: int
    alone: Annotated[bool, Field(description="Nothing else was in the scheduler.")]
    wait_ms: Annotated[float, Field(description="How long its oldest image had waited for an instance.")]
    run_ms: Annotated[float | None, Field(description="How long it ran; null while it does.")]


class SchedulerInfo(BaseModel):
    """One moment of the scheduler; the last releases, newest first."""

    queues: list[QueueInfo]
    instances: list[InstanceInfo]
    releases: list[ReleaseInfo]


@asynccontextmanager
async def changing(request: Request, engine: Engine, action: str, **what: str) -> AsyncIterator[None]:
    """What runs inside is audited, and has PVT_TIMEOUT_MS."""
    with audited(request, engine, action, **what):
        async with TimeLimit(engine.options.timeout_seconds):
            yield


@_post(
    "/refresh",
    summary="Look for new versions and aliases",
    responses={**documented(401, 403, 503, 504), 202: {"model": ModelList, "description": "It goes on."}},
)
async def refresh(
    request: Request, response: Response, background: BackgroundTasks, engine: EngineDep, max_wait: MaxWaitDep
) -> ModelList:
    """Take over what is new in the store now, also what failed before; responds when all that is loaded."""
    async with changing(request, engine, "refresh"):
        if max_wait is None:
            await engine.refresh(again=True)
        else:
            background.add_task(engine.refresh, again=True)
            response.status_code = 202
            response.headers.update(APPLIED)
    return ModelList(models=[model_info(model, request) for model in await engine.models()])


@_post("/{model_id}/load", summary="Load a model", responses={**CHANGED, **documented(504), **ACCEPTED})
async def load(
    request: Request, response: Response, model_id: str, engine: EngineDep, max_wait: MaxWaitDep
) -> ModelInfo:
    """Load a model, if it is not in memory; responds when it is, or at once with `Prefer: respond-async`."""
    async with changing(request, engine, "load", model=model_id):
        try:
            await engine.load(model_id, max_wait)
        except ModelLoading:
            response.status_code = 202
            response.headers.update(APPLIED)
    return model_info(await engine.model(model_id), request)


@_post("/{model_id}/unload", summary="Unload a model", responses={**CHANGED, **documented(409, 504)})
async def unload(request: Request, model_id: str, engine: EngineDep) -> ModelInfo:
    """Free a model's memory, in all its versions unless one is named, once no request uses it.

    The next request for it loads it again; one that comes while others still use it keeps it, and `state` tells.
    """
    async with changing(request, engine, "unload", model=model_id):
        await engine.unload(model_id)
    return model_info(await engine.model(model_id), request)


@_post("/{model_id}/pin", summary="Pin a model", responses={**CHANGED, **documented(504)})
async def pin(request: Request, model_id: str, engine: EngineDep) -> ModelInfo:
    """Load a model and never evict it, nor the versions that take its place; until the process ends."""
    async with changing(request, engine, "pin", model=model_id):
        await engine.pin(model_id)
    return model_info(await engine.model(model_id), request)


@_models.delete("/{model_id}/pin", summary="Unpin a model", response_model_exclude_none=True, responses=CHANGED)
async def unpin(request: Request, model_id: str, engine: EngineDep) -> ModelInfo:
    """Let a model be evicted again."""
    with audited(request, engine, "unpin", model=model_id):
        engine.unpin(model_id)
    return model_info(await engine.model(model_id), request)


@router.get("/aliases", summary="List the aliases", responses=documented(401, 403, 503))
async def aliases(engine: EngineDep) -> AliasList:
    """Every alias of the store."""
    return AliasList(aliases=await engine.aliases())


@router.put(
    "/aliases/{name}",
    summary="Set an alias",
    responses={**CHANGED, **documented(413, 415)},
    openapi_extra={"requestBody": json_body(AliasTarget, {"a version": {"model": "pvt_v2_b0.digits@1"}})},
)
async def set_alias(request: Request, name: str, engine: EngineDep) -> AliasList:
    """Let an alias stand for a model, in the store, so for all who use it.

    Where the alias is in use, its clients switch once the new model is loaded, and wait for nothing.
    """
    with engine.memory.reserve(0, BODIES) as held:
        target = await read_json(request, held, _target)
    with audited(request, engine, "set_alias", alias=name, model=target.model):
        await engine.set_alias(name, target.model)
    return AliasList(aliases=await engine.aliases())


@router.delete("/aliases/{name}", summary="Remove an alias", responses=CHANGED)
async def remove_alias(request: Request, name: str, engine: EngineDep) -> AliasList:
    """Let an alias stand for nothing."""
    with audited(request, engine, "remove_alias", alias=name):
        await engine.remove_alias(name)
    return AliasList(aliases=await engine.aliases())


@router.get("/debug/scheduler", summary="Look at the scheduler", responses=documented(401, 403))
async def get_scheduler(engine: EngineDep) -> SchedulerInfo:
    """Queues, instances, and the last batches that were released, with reason, size, wait and run time."""
    activity = engine.activity()
    return SchedulerInfo(
        queues=[_queue(queue) for queue in activity.queues],
        instances=[_instance(i, release, activity.now) for i, release in enumerate(activity.instances)],
        releases=[_release(release, activity.now) for release in activity.releases],
    )


def _queue(queue: QueueActivity) -> QueueInfo:
    plan = [BatchSize(size=n, ms=milliseconds(seconds)) for n, seconds in queue.plan.items()]
    return QueueInfo(**{**asdict(queue), "model": queue.lane}, batch_plan=plan)


def _instance(instance: int, release: Release | None, now: float) -> InstanceInfo:
    if not release:
        return InstanceInfo(instance=instance, busy=False)
    return InstanceInfo(**asdict(release), busy=True, ms=milliseconds(now - release.started))


def _release(release: Release, now: float) -> ReleaseInfo:
    seconds = release.run_seconds
    return ReleaseInfo(
        **asdict(release),
        seconds_ago=round(now - release.started, 3),
        wait_ms=milliseconds(release.waited_seconds),
        run_ms=None if seconds is None else milliseconds(seconds),
    )


router.include_router(_models)
