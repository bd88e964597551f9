"""What changes the models in memory, and the aliases of the store; for those who manage the service."""

from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.dependencies import (
    APPLIED,
    EngineDep,
    MaxWaitDep,
    SettingsDep,
    audited,
    require_management,
    require_one_process,
)
from app.problems import documented
from app.routes.model_info import ModelInfo, ModelList, model_info
from service.errors import ModelLoading
from service.lifecycle import time_limit

router = APIRouter(tags=["management"], dependencies=[Depends(require_management)])
_models = APIRouter(prefix="/models", dependencies=[Depends(require_one_process)])

ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": ModelInfo, "description": "It is on its way (`Prefer: respond-async`, or `wait` ended)."}
}
CHANGED = documented(401, 403, 404, 422, 503)


class AliasTarget(BaseModel):
    """What an alias is to stand for."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[
        str, Field(description="`<variant>.<tag>` or `<variant>.<tag>@<version>`.", examples=["pvt_v2_b0.digits@1"])
    ]


class AliasList(BaseModel):
    """Every alias of the store, and what it stands for."""

    aliases: dict[str, str]


@_models.post(
    "/refresh",
    summary="Look for new versions and aliases",
    response_model_exclude_none=True,
    responses={**documented(401, 403, 503, 504), **ACCEPTED, 202: {"model": ModelList, "description": "It goes on."}},
)
async def refresh(
    request: Request,
    response: Response,
    background: BackgroundTasks,
    *,
    engine: EngineDep,
    settings: SettingsDep,
    max_wait: MaxWaitDep,
) -> ModelList:
    """Take over what is new in the store now, also what failed before; responds when all that is loaded."""
    with audited(request, engine, "refresh"):
        if max_wait is None:
            async with time_limit(settings.timeout_ms / 1000):
                await engine.refresh(again=True)
        else:
            background.add_task(engine.refresh, again=True)
            response.status_code, response.headers["Preference-Applied"] = 202, APPLIED["Preference-Applied"]
    return ModelList(models=[model_info(model, request) for model in await engine.models()])


@_models.post(
    "/{model_id}/load",
    summary="Load a model",
    response_model_exclude_none=True,
    responses={**documented(401, 403, 404, 422, 503, 504), **ACCEPTED},
)
async def load(
    request: Request,
    response: Response,
    model_id: str,
    *,
    engine: EngineDep,
    settings: SettingsDep,
    max_wait: MaxWaitDep,
) -> ModelInfo:
    """Load a model, if it is not in memory; responds when it is, or at once with `Prefer: respond-async`."""
    with audited(request, engine, "load", model=model_id):
        try:
            async with time_limit(settings.timeout_ms / 1000):
                await engine.load(model_id, max_wait)
        except ModelLoading:
            response.status_code = 202
            response.headers.update(APPLIED)
    return model_info(await engine.model(model_id), request)


@_models.post(
    "/{model_id}/unload",
    summary="Unload a model",
    response_model_exclude_none=True,
    responses=documented(401, 403, 404, 409, 422, 503, 504),
)
async def unload(request: Request, model_id: str, engine: EngineDep, settings: SettingsDep) -> ModelInfo:
    """Free a model's memory, in all its versions unless one is named, once no request uses it.

    The next request for it loads it again; one that comes while others still use it keeps it, and `state` tells.
    """
    with audited(request, engine, "unload", model=model_id):
        async with time_limit(settings.timeout_ms / 1000):
            await engine.unload(model_id)
    return model_info(await engine.model(model_id), request)


@_models.post(
    "/{model_id}/pin",
    summary="Pin a model",
    response_model_exclude_none=True,
    responses=documented(401, 403, 404, 422, 503, 504),
)
async def pin(request: Request, model_id: str, engine: EngineDep, settings: SettingsDep) -> ModelInfo:
    """Load a model and never evict it, nor the versions that take its place; until the process ends."""
    with audited(request, engine, "pin", model=model_id):
        async with time_limit(settings.timeout_ms / 1000):
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


@router.put("/aliases/{name}", summary="Set an alias", responses=CHANGED)
async def set_alias(request: Request, name: str, target: AliasTarget, engine: EngineDep) -> AliasList:
    """Let an alias stand for a model, in the store, so for all who use it.

    Where the alias is in use, its clients switch once the new model is loaded, and wait for nothing.
    """
    with audited(request, engine, "set_alias", alias=name, model=target.model):
        await engine.set_alias(name, target.model)
    return AliasList(aliases=await engine.aliases())


@router.delete("/aliases/{name}", summary="Remove an alias", responses=CHANGED)
async def remove_alias(request: Request, name: str, engine: EngineDep) -> AliasList:
    """Let an alias stand for nothing."""
    with audited(request, engine, "remove_alias", alias=name):
        await engine.remove_alias(name)
    return AliasList(aliases=await engine.aliases())


router.include_router(_models)
