"""Health for orchestrators, metrics for Prometheus, the last minute. Open to all, whatever PVT_API_KEYS says."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from app.dependencies import HealthDep, LivenessDep, MetricsPageDep, StatsPageDep
from app.disclosure import shown
from app.problems import documented
from app.rendered import FORMATS
from app.routes.inference import preferred_media_type
from app.stats import STREAM, Stats
from service.results import Health

router = APIRouter(tags=["operations"])


class EventStream(StreamingResponse):
    """Server-sent events, as the HTML standard defines them."""

    media_type = "text/event-stream"


class HealthResponse(BaseModel):
    """`reasons` says what is wrong; empty when nothing is."""

    live: bool
    ready: bool
    reasons: list[str]


UNHEALTHY: dict[int | str, dict[str, Any]] = {503: {"model": HealthResponse, "description": "Not so; see `reasons`."}}


@router.get("/health", summary="Liveness and readiness", response_model=HealthResponse, responses=UNHEALTHY)
async def get_health(request: Request, state: HealthDep) -> JSONResponse:
    """Liveness and readiness, with reasons."""
    return _response(request, state, healthy=state.live and state.ready)


@router.get("/health/live", summary="Liveness", response_model=HealthResponse, responses=UNHEALTHY)
async def get_liveness(request: Request, state: LivenessDep) -> JSONResponse:
    """Whether the process does its work; if not, restart it."""
    return _response(request, state, healthy=state.live)


@router.get("/health/ready", summary="Readiness", response_model=HealthResponse, responses=UNHEALTHY)
@router.get(
    "/ping", name="ping", summary="Readiness, for SageMaker", response_model=HealthResponse, responses=UNHEALTHY
)
async def get_readiness(request: Request, state: HealthDep) -> JSONResponse:
    """Whether to send requests here."""
    return _response(request, state, healthy=state.ready)


def _response(request: Request, state: Health, *, healthy: bool) -> JSONResponse:
    reasons = [shown(request, each) for each in state.reasons]
    return JSONResponse({**asdict(state), "reasons": reasons}, 200 if healthy else 503)


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def get_metrics(request: Request, page: MetricsPageDep, state: HealthDep) -> Response:
    """Prometheus text, or OpenMetrics, which has exemplars, where `Accept` prefers it."""
    chosen = preferred_media_type(request, tuple(FORMATS)) or "text/plain"
    return Response(page.text(chosen, ready=state.ready), media_type=FORMATS[chosen][1], headers={"Vary": "Accept"})


@router.get("/stats", summary="The last minute", response_model=Stats)
async def get_stats(page: StatsPageDep) -> Response:
    """Rates, latencies, queues, batches and memory, now or in the last minute; of all workers, at most a second old."""
    return Response(page.text(), media_type="application/json")


@router.get(STREAM, summary="The last minute, each second", response_class=EventStream, responses=documented(429))
async def stream_stats(request: Request, page: StatsPageDep) -> Response:
    """Server-sent events: the object of `GET /stats` at once, and again each second."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy that buffers would hold events back
    if request.state.method == "HEAD":
        return EventStream(iter(()), headers=headers)  # without a length, as that of GET has none
    return EventStream(page.stream(), headers=headers)
