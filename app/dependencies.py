"""What routes ask for, each named once.

All are coroutines, though none awaits: FastAPI runs plain functions on a thread each, which costs more than they do.
"""

import hmac
from typing import Annotated, TypedDict

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from app.fetching import Fetcher
from app.member import Member
from app.problems import Forbidden, Unauthorized
from app.settings import Settings
from service.engine import Engine
from service.results import Health


class State(TypedDict):
    """What the lifespan yields."""

    engine: Engine
    settings: Settings
    registry: CollectorRegistry
    member: Member | None
    fetcher: Fetcher


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


# Their names in the OpenAPI document.
API_KEY, MANAGEMENT_KEY = "api_key", "management_key"

bearer = HTTPBearer(auto_error=False, scheme_name=API_KEY, description="One of PVT_API_KEYS.")
CredentialsDep = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]


async def require_key(credentials: CredentialsDep, settings: SettingsDep) -> None:
    """Refuse a request without one of PVT_API_KEYS."""
    if not _is_one_of(settings.api_keys, credentials):
        raise Unauthorized("this service requires an API key; send it as 'Authorization: Bearer <key>' (PVT_API_KEYS)")


_management = HTTPBearer(
    auto_error=False,
    scheme_name=MANAGEMENT_KEY,
    description="One of PVT_MANAGEMENT_KEYS.",
)
ManagementCredentialsDep = Annotated[HTTPAuthorizationCredentials | None, Security(_management)]


async def require_management_key(credentials: ManagementCredentialsDep, settings: SettingsDep) -> None:
    """Refuse a request without one of PVT_MANAGEMENT_KEYS, and every request where there is none."""
    if not settings.management_keys:
        raise Forbidden("management is off; set PVT_MANAGEMENT_KEYS to one or more keys to turn it on")
    if not _is_one_of(settings.management_keys, credentials):
        raise Unauthorized("send a management key as 'Authorization: Bearer <key>' (PVT_MANAGEMENT_KEYS)")


def _is_one_of(keys: tuple[SecretStr, ...], credentials: HTTPAuthorizationCredentials | None) -> bool:
    # Every key is compared, in constant time: how long it takes tells nothing.
    presented = (credentials.credentials if credentials else "").encode("utf-8", "surrogateescape")
    expected = [key.get_secret_value().encode("utf-8", "surrogateescape") for key in keys]
    matches = [hmac.compare_digest(presented, each) for each in expected]
    return any(matches)
