"""`GET /models`."""

from fastapi import APIRouter, Request

from app.dependencies import EngineDep
from app.problems import documented
from app.routes.model_info import ModelInfo, ModelList, model_info, remote_info
from service.errors import WeightsUnavailable

router = APIRouter(prefix="/models", tags=["models"])


@router.get(
    "",
    operation_id="list_models",
    summary="List the models",
    response_model_exclude_none=True,
    responses=documented(401, 503),
)
async def models(request: Request, engine: EngineDep) -> ModelList:
    """Every model of the store, and where it stands; then the published ones that could be fetched into it."""
    found = await engine.models()
    remote = [remote_info(each, request) for each in engine.remote_models(found)]
    return ModelList(models=[*(model_info(each, request) for each in found), *remote])


@router.get(
    "/{model_id}",
    operation_id="get_model",
    summary="Describe one model",
    response_model_exclude_none=True,
    responses=documented(401, 404, 422, 503),
)
async def model(request: Request, model_id: str, engine: EngineDep) -> ModelInfo:
    """One model; a variant alone finds what it would find in a request."""
    try:
        return model_info(await engine.model(model_id), request)
    except WeightsUnavailable:
        if remote := engine.remote_model(model_id):
            return remote_info(remote, request)
        raise
