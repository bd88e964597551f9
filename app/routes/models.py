"""`GET /models`."""

from fastapi import APIRouter

from app.dependencies import EngineDep
from app.model_info import ModelInfo, ModelList, model_info
from app.problems import documented

router = APIRouter(prefix="/models", tags=["models"])


@router.get("", summary="List the models", response_model_exclude_none=True, responses=documented(401, 503))
async def models(engine: EngineDep) -> ModelList:
    """Every model of the store, and where it stands."""
    return ModelList(models=[model_info(model) for model in await engine.models.all()])


@router.get(
    "/{model_id}",
    summary="Describe one model",
    response_model_exclude_none=True,
    responses=documented(401, 404, 422, 503),
)
async def model(model_id: str, engine: EngineDep) -> ModelInfo:
    """One model; a variant alone finds what it would find in a request."""
    return model_info(await engine.models.one(model_id))
