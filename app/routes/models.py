"""`GET /models`."""

from fastapi import APIRouter

from app.dependencies import EngineDep
from app.problems import documented
from app.routes.model_info import ModelInfo, ModelList, any_model_info, model_info, remote_info

router = APIRouter(prefix="/models", tags=["models"])


@router.get(
    "",
    operation_id="list_models",
    summary="List the models",
    response_model_exclude_none=True,
    responses=documented(401, 503),
)
async def models(engine: EngineDep) -> ModelList:
    """Every model of the store, and where it stands; then the published ones that could be fetched into it."""
    found = await engine.models.all()
    return ModelList(models=[*map(model_info, found), *map(remote_info, engine.models.remote(found))])


@router.get(
    "/{model_id}",
    operation_id="get_model",
    summary="Describe one model",
    response_model_exclude_none=True,
    responses=documented(401, 404, 422, 503),
)
async def model(model_id: str, engine: EngineDep) -> ModelInfo:
    """One model; a variant alone finds what it would find in a request."""
    return any_model_info(await engine.models.described(model_id))
