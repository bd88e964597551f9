"""What routes ask for, each named once.

All are coroutines, though none awaits: FastAPI runs plain functions on a thread each, which costs more than they do.
"""

import hmac
from ipaddress import ip_address
from typing import Annotated, TypedDict
from urllib.parse import urlsplit

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
    description="One of PVT_MANAGEMENT_KEYS, where the service has some; without, only PVT_MANAGEMENT_PORT answers.",
)
ManagementCredentialsDep = Annotated[HTTPAuthorizationCredentials | None, Security(_management)]


async def require_management(request: Request, credentials: ManagementCredentialsDep, settings: SettingsDep) -> None:
    """Refuse a request without one of PVT_MANAGEMENT_KEYS, or on another port than PVT_MANAGEMENT_PORT if there is one.

    Every request, where there is neither. Who manages is left in `request.state.manager`.
    """
    port = settings.management_port
    if port and request.scope["server"][1] != port:
        raise Forbidden(f"management is answered on port {port} only (PVT_MANAGEMENT_PORT)")
    if settings.management_keys:
        if not _is_one_of(settings.management_keys, credentials):
            raise Unauthorized("send a management key as 'Authorization: Bearer <key>' (PVT_MANAGEMENT_KEYS)")
        request.state.manager = "key"
    elif not port:
        raise Forbidden(
            "management is off; set PVT_MANAGEMENT_KEYS to one or more keys, or PVT_MANAGEMENT_PORT to turn it on"
        )
    else:
        _refuse_pages(request, settings)
        request.state.manager = "port"


async def require_one_process(settings: SettingsDep) -> None:
    """Refuse, where there are several workers: each has models of its own, and whoever asks reaches any of them."""
    if settings.workers > 1:
        raise Forbidden(
            f"PVT_WORKERS is {settings.workers} and each worker has its own models, so this would change one of them "
            "only; use PVT_PRELOAD and PVT_PINNED, and aliases, which every worker follows"
        )


def _refuse_pages(request: Request, settings: Settings) -> None:
    """A page of another site must not use its reader's browser to get at a port that asks for no key."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    name = urlsplit(f"//{host}").hostname or ""
    if name not in {"localhost", settings.management_host} and not _is_address(name):
        raise Forbidden(
            f"Host {host!r} is no address; reach the management port by its address, or set PVT_MANAGEMENT_KEYS"
        )
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden(f"a page of {origin!r} may not use the management port, which asks for no key")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_one_of(keys: tuple[SecretStr, ...], credentials: HTTPAuthorizationCredentials | None) -> bool:
    # Every key is compared, in constant time: how long it takes tells nothing.
    presented = (credentials.credentials if credentials else "").encode("utf-8", "surrogateescape")
    expected = [key.get_secret_value().encode("utf-8", "surrogateescape") for key in keys]
    matches = [hmac.compare_digest(presented, each) for each in expected]
    return any(matches)
