"""What routes ask for, each named once.

All are coroutines, though none awaits: FastAPI runs plain functions on a thread each, which costs more than they do.
"""

import hmac
from typing import Annotated, TypedDict

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry

from app.member import Member
from app.problems import Unauthorized
from app.settings import Settings
from service.engine import Engine
from service.results import Health


class State(TypedDict):
    """What the lifespan yields."""

    engine: Engine
    settings: Settings
    registry: CollectorRegistry
    member: Member | None


async def get_engine(request: Request) -> Engine:
    """The engine of this process."""
    engine: Engine = request.state.engine
    return engine


async def get_settings(request: Request) -> Settings:
    """The settings of this process."""
    settings: Settings = request.state.settings
    return settings


async def get_registry(request: Request) -> CollectorRegistry:
    """The metrics of this process."""
    registry: CollectorRegistry = request.state.registry
    return registry


async def get_health(request: Request) -> Health:
    """Liveness and readiness of the service: of this process and of the workers beside it, if there are any."""
    return _together(request, await request.state.engine.health())


async def get_liveness(request: Request) -> Health:
    """The same, but asks no disk: only liveness counts."""
    return _together(request, request.state.engine.live())


def _together(request: Request, own: Health) -> Health:
    member: Member | None = request.state.member
    return own if member is None else member.health(own, request.state.settings.stall_seconds)


EngineDep = Annotated[Engine, Depends(get_engine)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
HealthDep = Annotated[Health, Depends(get_health)]
LivenessDep = Annotated[Health, Depends(get_liveness)]
RegistryDep = Annotated[CollectorRegistry, Depends(get_registry)]


bearer = HTTPBearer(auto_error=False, description="One of PVT_API_KEYS, where the service has some.")
CredentialsDep = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]


async def require_key(credentials: CredentialsDep, settings: SettingsDep) -> None:
    """Refuse a request without one of PVT_API_KEYS."""
    # Every key is compared, in constant time: how long it takes tells nothing.
    presented = (credentials.credentials if credentials else "").encode("utf-8", "surrogateescape")
    keys = [key.get_secret_value().encode("utf-8", "surrogateescape") for key in settings.api_keys]
    matches = [hmac.compare_digest(presented, key) for key in keys]
    if not any(matches):
        raise Unauthorized("this service requires an API key; send it as 'Authorization: Bearer <key>' (PVT_API_KEYS)")
