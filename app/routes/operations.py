"""Health for orchestrators, metrics for Prometheus, a page for people. Open to all, whatever PVT_API_KEYS says."""

from dataclasses import asdict
from html import escape
from importlib.metadata import version
from string import Template
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from app.dependencies import HealthDep, LivenessDep, MetricsPageDep, SettingsDep, StatsPageDep
from app.disclosure import shown
from app.problems import documented
from app.proxies import base_url
from app.rendered import FORMATS
from app.routes.inference import preferred_media_type
from app.stats import STREAM, Stats
from service.results import Health

router = APIRouter(tags=["operations"])

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pvt-serve</title>
<link rel="icon" href="data:,">
<style>
  body { font: 16px/1.6 system-ui, sans-serif; max-width: 42rem; margin: 4rem auto; padding: 0 1rem; color: #1d2733; }
  code, pre { background: #f1f4f8; border-radius: 6px; padding: .15em .4em; }
  pre { padding: 1rem; overflow-x: auto; }
  a { color: #0b5cad; }
</style>
<h1>pvt-serve</h1>
<p>This service classifies images with Pyramid Vision Transformer v2 models. Its default model is
<code>$model</code>.</p>
<pre>curl -F image=@image.png $url/predict</pre>
<ul>
  <li><a href="$root/docs">Every endpoint, to try out</a></li>
  <li><a href="$root/models">The models of the store</a></li>
  <li><a href="$root/health">Health</a> and <a href="$root/metrics">metrics</a></li>
</ul>
<p>Version $version</p>
</html>
""")


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
async def get_metrics(request: Request, page: MetricsPageDep) -> Response:
    """Prometheus text, or OpenMetrics, which has exemplars, where `Accept` prefers it."""
    chosen = preferred_media_type(request, tuple(FORMATS)) or "text/plain"
    return Response(page.text(chosen), media_type=FORMATS[chosen][1], headers={"Vary": "Accept"})


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


@router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Every endpoint, to try out; it loads nothing from elsewhere."""
    root = request.scope.get("root_path", "")
    files = f"{root}/static-offline-docs"
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="pvt-serve - Swagger UI",
        swagger_js_url=f"{files}/swagger-ui-bundle.js",
        swagger_css_url=f"{files}/swagger-ui.css",
        swagger_favicon_url=f"{files}/favicon.png",
    )


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def index(request: Request, settings: SettingsDep) -> str:
    """A short page that says what this is."""
    root = request.scope.get("root_path", "")
    model = escape(settings.default_model)
    return _PAGE.substitute(model=model, root=root, url=base_url(request.scope), version=version("pvt-serve"))
