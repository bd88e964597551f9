"""Health for orchestrators, metrics for Prometheus, the last minute. Open to all, whatever PVT_API_KEYS says."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette._utils import get_route_path
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from app.dependencies import HealthDep, LivenessDep, MetricsPageDep, StatsPageDep
from app.disclosure import shown
from app.problems import documented
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
async def get_metrics(page: MetricsPageDep) -> Response:
    """Prometheus text."""
    return Response(page.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/stats", summary="The last minute", response_model=Stats)
async def get_stats(page: StatsPageDep) -> Response:
    """Rates, latencies, queues, batches and memory, now or in the last minute; of all workers, at most a second old."""
    return Response(page.text(), media_type="application/json")


@router.get(STREAM, summary="The last minute, each second", response_class=EventStream, responses=documented(429))
async def stream_stats(request: Request, page: StatsPageDep) -> Response:
    """Server-sent events: the object of `GET /stats` at once, and again each second."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy that buffers would hold events back
    if request.state.method == "HEAD":
        return Response(media_type=EventStream.media_type, headers=headers)
    return EventStream(page.stream(), headers=headers)


class ServerWide(BaseRoute):
    """`OPTIONS *`, by which proxies look whether a server is there (RFC 9110, 9.3.7)."""

    path = "*"

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See Starlette; the base path of a server stands before the asterisk."""
        whole = scope["type"] == "http" and scope["method"] == "OPTIONS" and get_route_path(scope) == self.path
        return (Match.FULL if whole else Match.NONE), {"route": self}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with no more than that."""
        await Response(status_code=204, headers={"Allow": "GET, HEAD, POST, PUT, DELETE, OPTIONS"})(
            scope, receive, send
        )
