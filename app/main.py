"""The application, put together."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.metadata import version

from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from app import openapi, problems
from app.dependencies import State, require_key
from app.direct import Direct
from app.engine_options import engine_options
from app.fetching import Fetcher
from app.member import Member
from app.metrics import FetchMetrics, HttpMetrics
from app.middleware import RequestContext
from app.routes import (
    debug,
    explain,
    features,
    health,
    management,
    models,
    openai,
    pages,
    predict,
    v2,
    v2_models,
    v2_repository,
)
from app.settings import Settings
from service.engine import Engine
from service.metrics import EngineMetrics


def create_app(settings: Settings, member: Member | None = None) -> FastAPI:
    """The ASGI application for `settings`; its engine lives from startup to shutdown. `member`: one of several."""
    registry = _registry() if member is None else CollectorRegistry()
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
        lifespan=_lifespan(settings, registry, member),
    )
    app.add_middleware(
        Direct, endpoints={endpoint.path: endpoint for endpoint in (predict.DIRECT, features.DIRECT, explain.DIRECT)}
    )
    app.add_middleware(RequestContext, metrics=HttpMetrics(registry))
    problems.install(app)
    # Only where keys are set: a dependency costs each request, and the docs then ask for a key that nobody has.
    protected = [Depends(require_key)] if settings.api_keys else []
    for module in (predict, features, explain, models, v2, v2_models, v2_repository, openai):
        app.include_router(module.router, dependencies=protected)
    for module in (health, pages, debug, management):
        app.include_router(module.router)
    for router in (v2.health, v2_repository.management):
        app.include_router(router)
    openapi.describe(app, settings)
    return app


def _lifespan(
    settings: Settings, registry: CollectorRegistry, member: Member | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        options = engine_options(settings)
        async with AsyncExitStack() as stack:
            fetcher = await stack.enter_async_context(_fetcher(settings, registry))
            if member is None:
                engine = await stack.enter_async_context(Engine(options, EngineMetrics(registry)))
                yield State(engine=engine, settings=settings, registry=registry, member=None, fetcher=fetcher)
            else:
                engine = Engine(member.share_of(options), EngineMetrics(registry))
                await stack.enter_async_context(engine)
                await stack.enter_async_context(member.at_work(engine))
                yield State(
                    engine=engine, settings=settings, registry=member.registry(), member=member, fetcher=fetcher
                )

    return lifespan


def _fetcher(settings: Settings, registry: CollectorRegistry) -> Fetcher:
    return Fetcher(
        settings.url_reach,
        FetchMetrics(registry),
        max_bytes=settings.max_body_bytes,
        seconds=settings.url_timeout_ms / 1000,
    )


def _registry() -> CollectorRegistry:
    """A registry of this application's own, so that several can live in one process."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry
