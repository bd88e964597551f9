"""The application, put together."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields
from functools import partial
from time import monotonic
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from starlette.routing import Mount, Route

from app import logs, openapi, problems
from app.clients import Clients
from app.dependencies import State, require_key
from app.metrics import HttpMetrics, ProcessMetrics
from app.middleware import RequestContext
from app.open_inference import routes as open_inference
from app.open_inference.messages import HEADER_LENGTH
from app.proxies import Proxies
from app.remote_images.fetching import Fetcher
from app.rendered import MetricsPage, openapi_route
from app.routes import images, management, models, openai, operations, page, platforms
from app.routes.inference import InferenceRoute
from app.settings import Settings, SettingsInvalid
from app.stats import StatsPage, share_of
from app.tracing import check, tracing
from app.workers import Worker
from service.backends.cuda import choose, visible
from service.engine import Engine
from service.machine import memory_limit_bytes, usable_cores
from service.memory import budget
from service.metrics import EngineMetrics
from service.options import Budget, EngineOptions, default_instances
from service.sharing import cancel

# Images per batch where no setting says so; the batch plan stops earlier, as soon as more do not pay.
MAX_BATCH_SIZE = {"cpu": 8, "gpu": 256}
# The endpoints behind PVT_API_KEYS; the others have keys of their own, or none.
PROTECTED = models.router, open_inference.router, openai.router, platforms.router
OTHERS = operations.router, management.router, open_inference.health, open_inference.management, page.router

# What web pages of PVT_CORS_ORIGINS may send and read. Keys travel in a header, so no cookies are allowed.
CORS: Mapping[str, Any] = {
    "allow_methods": ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"),
    "allow_headers": ("*",),
    "allow_private_network": True,
    "expose_headers": (
        *("X-Request-ID", "Server-Timing", "Retry-After", "WWW-Authenticate", "Allow", "Accept-Encoding"),
        *("Preference-Applied", HEADER_LENGTH, "ETag", "Cache-Status"),
    ),
}


def create_app(settings: Settings | None = None, worker: Worker | None = None) -> FastAPI:
    """The ASGI application; its engine lives from startup to shutdown.

    Without `settings` they, and the form of log lines, come from the environment. `worker`: one of several.

    Raises:
        SettingsInvalid: a setting is unknown or out of bounds, the content cache does not fit into memory, or `OTEL_*`
            ask for what is not installed.
        BackendUnavailable: the settings name a GPU that does not exist.
    """
    check()
    if settings is None:
        settings = Settings.from_environment()
        logs.configure(settings.log_format, level=settings.log_level, secrets=settings.secrets)
    options = engine_options(settings)
    if worker:
        options = worker.share_of(options)
    _check_cache(options)
    registry = CollectorRegistry()  # of this application's own, so that several can live in one process
    http = HttpMetrics(registry)
    framework: Callable[..., FastAPI] = FastAPIOffline if settings.ui else FastAPI  # with the files of `/docs`, or not
    app = framework(
        **openapi.INFO,
        docs_url=None,  # `page` has it
        redirect_slashes=False,  # a redirect would go to whatever host the client names
        telemetry=dict.fromkeys(("tracing", "metrics", "logs"), False),  # `app.tracing` knows the stages too
        lifespan=partial(_lifespan, settings, options, registry, http, worker=worker),
        exception_handlers=dict.fromkeys(problems.EXPECTED, problems.expected),
        # First in the table of routes, so that no time is lost on others.
        routes=[*platforms.own_routes(settings), *images.router.routes],
    )
    _add_middleware(app, settings, http, Clients(settings, registry))
    # Only where keys are set: a dependency costs each request.
    protected = [Depends(require_key)] if settings.api_keys else []
    for router in PROTECTED:
        app.include_router(router, dependencies=protected)
    for router in OTHERS:
        if settings.ui or router is not page.router:
            app.include_router(router)
    openapi.describe(app, settings)
    own = next(n for n, route in enumerate(app.routes) if getattr(route, "path", "") == app.openapi_url)
    app.router.routes[own] = openapi_route(app)
    return app


def _add_middleware(app: FastAPI, settings: Settings, metrics: HttpMetrics, clients: Clients) -> None:
    app.add_middleware(
        RequestContext,
        metrics=metrics,
        clients=clients,
        proxies=Proxies(settings, _first_segments(app)),
        health_route=settings.health_route,
        slow_seconds=settings.slow_ms / 1000,
        direct=[
            each
            for each in images.router.routes
            if isinstance(each, InferenceRoute) and each.path not in {settings.predict_route, settings.health_route}
        ],
    )
    if settings.cors_origins:  # outermost: errors of every kind have its headers
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)


def _first_segments(app: FastAPI) -> set[str]:
    """Of the paths of all endpoints; `app` has those of the framework so far."""
    routes = [*app.routes, *(route for router in (*PROTECTED, *OTHERS) for route in router.routes)]
    return {route.path.split("/")[1] for route in routes if isinstance(route, Route | Mount)}


def engine_options(settings: Settings) -> EngineOptions:
    """What of `settings` concerns the engine, in its units: bytes, seconds, pixels.

    Raises:
        BackendUnavailable: the settings name a GPU that does not exist.
    """
    devices = () if settings.backend == "openvino" else choose(settings.device, visible())
    cores = usable_cores()
    same = {field.name for field in fields(EngineOptions)} & {*Settings.model_fields}  # in name; those below differ
    options: dict[str, Any] = {name: getattr(settings, name) for name in same} | {
        "model_store": settings.store_folder,
        "remote_store": settings.remote_store,
        "pull": settings.pull == "on_demand",
        "mirror": settings.mirror or None,
        "budget": Budget(int(settings.memory_budget_mb * 1e6) or None, settings.min_residency_seconds),
        "cache": settings.cache_folder,
        "precision": None if settings.precision == "auto" else settings.precision,
        "devices": devices,
        "cores": cores,
        "instances": settings.instances or default_instances(devices, cores),
        "max_batch_size": settings.max_batch_size or MAX_BATCH_SIZE["gpu" if devices else "cpu"],
        "max_batch_delay_seconds": settings.max_batch_delay_ms / 1000,
        "timeout_seconds": settings.timeout_ms / 1000,
        "max_image_pixels": int(settings.max_image_megapixels * 1e6),
        "max_map_bytes": int(settings.max_maps_mb * 1e6),
        "max_body_bytes": settings.max_body_bytes,
        "memory_bytes": int(settings.memory_mb * 1e6) or memory_limit_bytes(),
        "cache_bytes": int(settings.cache_mb * 1e6),
    }
    return EngineOptions(**options)


def _check_cache(options: EngineOptions) -> None:
    """Raises SettingsInvalid where the content cache would leave too little memory for everything else."""
    if not options.memory_bytes or not options.cache_bytes:
        return
    most = budget(options.memory_bytes, options.max_body_bytes, options.max_map_bytes).limit // 2
    if options.cache_bytes > most:
        raise SettingsInvalid(
            f"PVT_CACHE_MB: {options.cache_bytes / 1e6:.0f} MB for each process are more than half of what the limit "
            f"of the container, or PVT_MEMORY_MB, leaves it; {most / 1e6:.0f} MB would fit"
        )


def _with_process(registry: CollectorRegistry) -> CollectorRegistry:
    """`registry`, with what the client library knows of this process."""
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


@asynccontextmanager
async def _lifespan(
    settings: Settings,
    options: EngineOptions,
    registry: CollectorRegistry,
    http: HttpMetrics,
    app: FastAPI,
    *,
    worker: Worker | None,
) -> AsyncIterator[State]:
    async with AsyncExitStack() as stack:
        seconds = settings.url_timeout_ms / 1000
        fetcher = Fetcher(settings.url_reach, registry, max_bytes=settings.max_body_bytes, seconds=seconds)
        await stack.enter_async_context(fetcher)
        spans = await stack.enter_async_context(tracing())
        engine = Engine(options, EngineMetrics(registry), spans.batch if spans else None)
        await stack.enter_async_context(engine)
        process = ProcessMetrics(registry)

        def collect() -> None:
            engine.collect_metrics()
            process.collect()

        lag = asyncio.create_task(process.measure_lag())
        stack.push_async_callback(cancel, [lag])
        own = partial(share_of, engine, http.traffic, monotonic())
        metrics = MetricsPage(worker.group.registry(os.getppid()) if worker else _with_process(registry), collect)
        stats = StatsPage(engine, partial(worker.shares, own) if worker else lambda: [own()])
        state = State(
            engine=engine,
            settings=settings,
            http=http,
            metrics=metrics,
            stats=stats,
            worker=worker,
            fetcher=fetcher,
            tracing=spans,
        )
        app.state.started = state  # for hosts without lifespan state
        if settings.grpc_port:
            from app.open_inference import grpc_server  # noqa: PLC0415  an extra, which not everybody has

            await stack.enter_async_context(grpc_server.serving(app, state, registry))
        if worker:  # the first report says that it listens
            await stack.enter_async_context(worker.reporting(engine, own, collect))
        yield state
