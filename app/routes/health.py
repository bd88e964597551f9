"""Health for orchestrators, metrics for Prometheus. Open to all, whatever PVT_API_KEYS says."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from app.dependencies import HealthDep, LivenessDep, MetricsPageDep
from app.disclosure import shown

router = APIRouter(tags=["operations"])


class HealthResponse(BaseModel):
    """`reasons` says what is wrong; empty when nothing is."""

    live: bool
    ready: bool
    reasons: list[str]


UNHEALTHY: dict[int | str, dict[str, Any]] = {503: {"model": HealthResponse, "description": "Not so; see `reasons`."}}


@router.get("/health", operation_id="get_health", summary="Liveness and readiness", responses=UNHEALTHY)
async def health(request: Request, state: HealthDep, response: Response) -> HealthResponse:
    """Liveness and readiness, with reasons."""
    response.status_code = 200 if state.live and state.ready else 503
    return HealthResponse(live=state.live, ready=state.ready, reasons=[shown(request, each) for each in state.reasons])


@router.get("/health/live", operation_id="get_liveness", summary="Liveness", responses=UNHEALTHY)
async def live(request: Request, state: LivenessDep, response: Response) -> HealthResponse:
    """Whether the process does its work; if not, restart it."""
    response.status_code = 200 if state.live else 503
    return HealthResponse(live=state.live, ready=state.ready, reasons=[shown(request, each) for each in state.reasons])


@router.get("/health/ready", operation_id="get_readiness", summary="Readiness", responses=UNHEALTHY)
async def ready(request: Request, state: HealthDep, response: Response) -> HealthResponse:
    """Whether to send requests here."""
    response.status_code = 200 if state.ready else 503
    return HealthResponse(live=state.live, ready=state.ready, reasons=[shown(request, each) for each in state.reasons])


@router.get("/metrics", operation_id="get_metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(page: MetricsPageDep) -> Response:
    """Prometheus text."""
    return Response(page.text(), media_type=CONTENT_TYPE_LATEST)
