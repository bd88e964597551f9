"""The application, put together."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.metadata import version

from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from app import logs, openapi, problems
from app.dependencies import State, require_key
from app.middleware import HttpMetrics, RequestContext
from app.open_inference import routes as open_inference
from app.remote_images.fetching import Fetcher
from app.routes import images, management, models, openai, operations
from app.settings import Settings
from app.workers.worker import Worker
from service.engine import Engine
from service.machine.cores import usable_cores
from service.machine.devices import choose, visible
from service.metrics import EngineMetrics
from service.options import Budget, EngineOptions, default_instances

# Images per batch where no setting says so; the batch plan stops earlier, as soon as more do not pay.
MAX_BATCH_SIZE = {"cpu": 8, "gpu": 256}


def create_app(settings: Settings | None = None, worker: Worker | None = None) -> FastAPI:
    """The ASGI application; its engine lives from startup to shutdown.

    Without `settings` they, and the form of log lines, come from the environment. `worker`: one of several.

    Raises:
        SettingsInvalid: a setting is unknown or out of bounds.
        BackendUnavailable: the settings name a GPU that does not exist.
    """
    if settings is None:
        settings = Settings.from_environment()
        logs.configure(settings.log_format)
    options = engine_options(settings)
    registry = _registry() if worker is None else CollectorRegistry()
    app = FastAPIOffline(
        title="pvt-serve",
        summary=openapi.SUMMARY,
        description=openapi.DESCRIPTION,
        version=version("pvt-serve"),
        openapi_tags=openapi.TAGS,
        servers=openapi.SERVERS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        generate_unique_id_function=openapi.operation_id,
        redoc_url=None,  # one page of documentation is enough, and that one loads a logo from elsewhere
        lifespan=_lifespan(settings, options, registry, worker),
        # First in the table of routes, so that no time is lost on others.
        routes=images.router.routes,
    )
    app.add_middleware(RequestContext, metrics=HttpMetrics(registry))
    problems.install(app)
    # Only where keys are set: a dependency costs each request.
    protected = [Depends(require_key)] if settings.api_keys else []
    for router in (models.router, open_inference.router, openai.router):
        app.include_router(router, dependencies=protected)
    for router in (operations.router, management.router, open_inference.health, open_inference.management):
        app.include_router(router)
    openapi.describe(app, settings)
    return app


def engine_options(settings: Settings) -> EngineOptions:
    """What of `settings` concerns the engine, in its units: bytes, seconds, pixels.

    Raises:
        BackendUnavailable: the settings name a GPU that does not exist.
    """
    devices = () if settings.backend == "openvino" else choose(settings.device, visible())
    cores = usable_cores()
    return EngineOptions(
        model_store=settings.store_folder,
        remote_store=settings.remote_store,
        default_model=settings.default_model,
        pull=settings.pull == "on_demand",
        mirror=settings.mirror or None,
        preload=settings.preload,
        pinned=settings.pinned,
        budget=Budget(
            bytes=int(settings.memory_budget_mb * 1e6) or None, min_residency_seconds=settings.min_residency_seconds
        ),
        cold=settings.cold,
        reload_seconds=settings.reload_seconds,
        backend=settings.backend,
        cache=settings.cache_folder,
        precision=None if settings.precision == "auto" else settings.precision,
        devices=devices,
        compile=settings.compile,
        cores=cores,
        instances=settings.instances or default_instances(devices, cores),
        max_batch_size=settings.max_batch_size or MAX_BATCH_SIZE["gpu" if devices else "cpu"],
        max_batch_delay_seconds=settings.max_batch_delay_ms / 1000,
        queue_size=settings.queue_size,
        timeout_seconds=settings.timeout_ms / 1000,
        max_image_pixels=int(settings.max_image_megapixels * 1e6),
        scaled_jpeg=settings.scaled_jpeg,
        max_images=settings.max_images,
        max_input_side=settings.max_input_side,
        sizes_per_model=settings.sizes_per_model,
        max_map_bytes=int(settings.max_maps_mb * 1e6),
        stall_seconds=settings.stall_seconds,
    )


def _lifespan(
    settings: Settings, options: EngineOptions, registry: CollectorRegistry, worker: Worker | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            fetcher = await stack.enter_async_context(_fetcher(settings, registry))
            engine = Engine(worker.share_of(options) if worker else options, EngineMetrics(registry))
            await stack.enter_async_context(engine)
            if worker:
                await stack.enter_async_context(worker.reporting(engine))
            shown = worker.group.registry(os.getppid()) if worker else registry
            state = State(engine=engine, settings=settings, registry=shown, worker=worker, fetcher=fetcher)
            for name, value in state.items():  # for hosts without lifespan state
                setattr(app.state, name, value)
            yield state

    return lifespan


def _fetcher(settings: Settings, registry: CollectorRegistry) -> Fetcher:
    seconds = settings.url_timeout_ms / 1000
    return Fetcher(settings.url_reach, registry, max_bytes=settings.max_body_bytes, seconds=seconds)


def _registry() -> CollectorRegistry:
    """A registry of this application's own, so that several can live in one process."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry
