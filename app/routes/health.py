"""Health for orchestrators, metrics for Prometheus. Open to all, whatever PVT_API_KEYS says."""

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from app.dependencies import EngineDep, RegistryDep
from app.schemas import HealthResponse

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(engine: EngineDep, response: Response) -> HealthResponse:
    """Liveness and readiness, with reasons."""
    state = await engine.health()
    response.status_code = 200 if state.live and state.ready else 503
    return HealthResponse(live=state.live, ready=state.ready, reasons=state.reasons)


@router.get("/health/live")
async def live(engine: EngineDep, response: Response) -> HealthResponse:
    """Whether the process does its work; if not, restart it."""
    state = await engine.health()
    response.status_code = 200 if state.live else 503
    return HealthResponse(live=state.live, ready=state.ready, reasons=state.reasons)


@router.get("/health/ready")
async def ready(engine: EngineDep, response: Response) -> HealthResponse:
    """Whether to send requests here."""
    state = await engine.health()
    response.status_code = 200 if state.ready else 503
    return HealthResponse(live=state.live, ready=state.ready, reasons=state.reasons)


@router.get("/metrics")
async def metrics(engine: EngineDep, registry: RegistryDep) -> Response:
    """Prometheus text."""
    engine.collect_metrics()
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
