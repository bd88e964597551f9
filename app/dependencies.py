"""What routes depend on, each named once: the process's state, keys, and the audit of management.

All are coroutines, though none awaits: FastAPI runs plain functions on a thread each, which costs more than they do.
"""

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Annotated, Any, TypedDict
from urllib.parse import urlsplit

import structlog
from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.metrics import HttpMetrics
from app.problems import Forbidden, Unauthorized
from app.remote_images.fetching import Fetcher
from app.rendered import MetricsPage
from app.settings import UNIX_PREFIX, Settings
from app.stats import StatsPage
from app.tracing import Tracing
from app.workers import Worker
from service.engine import Engine
from service.names import meant
from service.results import Health

log = structlog.get_logger(component="management")

_WAIT = re.compile(r"wait\s*=\s*\"?([0-9]{1,9})\"?")  # of `Prefer`, RFC 7240
_SIMILAR = {"origin"}  # to Authorization in its letters alone
_KEY_HEADERS = {"x-api-key", "api-key", "apikey", "x-auth-token", "x-access-token", "x-api-token", "token"}
_SHOWN = 100  # characters of a header's name
APPLIED = {"Preference-Applied": "respond-async"}
# Their names in the OpenAPI document.
API_KEY, MANAGEMENT_KEY = "api_key", "management_key"


class State(TypedDict):
    """What the lifespan yields; `worker` where there are several, `tracing` where requests are traced."""

    engine: Engine
    settings: Settings
    http: HttpMetrics
    metrics: MetricsPage
    stats: StatsPage
    worker: Worker | None
    fetcher: Fetcher
    tracing: Tracing | None


def _from_state(name: str) -> Callable[[Request], Awaitable[Any]]:
    async def get(request: Request) -> Any:  # noqa: ANN401  as the aliases below say
        return getattr(request.state, name)

    return get


async def get_health(request: Request) -> Health:
    """Liveness and readiness of the service: of this process and of the other workers, if there are any."""
    return _combined(request, await request.state.engine.health())


async def get_liveness(request: Request) -> Health:
    """The same without a look at the disk: only liveness counts."""
    return _combined(request, request.state.engine.live())


def _combined(request: Request, own: Health) -> Health:
    worker: Worker | None = request.state.worker
    if not worker:
        return own
    return worker.health(own, request.state.settings.stall_seconds, request.state.engine.clock)


EngineDep = Annotated[Engine, Depends(_from_state("engine"))]
SettingsDep = Annotated[Settings, Depends(_from_state("settings"))]
# The metrics of this process, or of all workers where there are several.
MetricsPageDep = Annotated[MetricsPage, Depends(_from_state("metrics"))]
StatsPageDep = Annotated[StatsPage, Depends(_from_state("stats"))]
HealthDep = Annotated[Health, Depends(get_health)]
LivenessDep = Annotated[Health, Depends(get_liveness)]


async def max_wait_seconds(request: Request) -> float | None:
    """How long to wait for a model that is not loaded, by `Prefer`: `wait=<seconds>`, 0 with `respond-async` alone.

    None without either. Preferences that are unknown or malformed are ignored, as RFC 7240 demands.
    """
    if "prefer" not in request.headers:
        return None
    values = ",".join(request.headers.getlist("prefer")).lower().split(",")
    preferences = [value.partition(";")[0].strip() for value in values]
    waits = [float(match[1]) for each in preferences if (match := _WAIT.fullmatch(each))]
    return waits[0] if waits else 0.0 if "respond-async" in preferences else None


MaxWaitDep = Annotated[float | None, Depends(max_wait_seconds)]

bearer = HTTPBearer(auto_error=False, scheme_name=API_KEY, description="One of PVT_API_KEYS.")
CredentialsDep = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]


async def require_key(request: Request, settings: SettingsDep, _: CredentialsDep = None) -> None:
    """Refuse a request without one of PVT_API_KEYS, if there are any; `app.clients` has read it."""
    if settings.api_keys and request.state.role != "api":
        way = "this service requires an API key; send it as 'Authorization: Bearer <key>' (PVT_API_KEYS)"
        raise Unauthorized(way + _misplaced(request))


def _misplaced(request: Request) -> str:
    """Where a key may be instead, never the key."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if key and scheme.lower() == "bearer":
        return (
            f"; the one that was sent is {'for management' if request.state.role == 'management' else 'none of them'}"
        )
    if scheme:
        return "; the Authorization that was sent is no Bearer"
    others = (
        name
        for name in request.headers
        if name in _KEY_HEADERS or (name not in _SIMILAR and meant(name, ["authorization"]))
    )
    return "".join(f"; {name[:_SHOWN]!r} is not read" for name in [*others][:1])


_management = HTTPBearer(
    auto_error=False,
    scheme_name=MANAGEMENT_KEY,
    description="One of PVT_MANAGEMENT_KEYS, where the service has some; without, only PVT_MANAGEMENT_PORT serves it.",
)
ManagerDep = Annotated[HTTPAuthorizationCredentials | None, Security(_management)]


async def require_management(request: Request, settings: SettingsDep, _: ManagerDep = None) -> None:
    """Refuse a request on another port than PVT_MANAGEMENT_PORT, or without one of PVT_MANAGEMENT_KEYS, if set.

    A Unix socket that PVT_MANAGEMENT_HOST names stands for the port. Refuse every request if nothing of it is set.
    `request.state.manager` says how the request was let in.
    """
    apart, on_unix = settings.manages_apart, settings.management_host.startswith(UNIX_PREFIX)
    if apart and not settings.is_for_management(request.scope["server"]):
        only = "the socket of PVT_MANAGEMENT_HOST" if on_unix else f"port {settings.management_port}"
        raise Forbidden(f"management is served on {only} only{'' if on_unix else ' (PVT_MANAGEMENT_PORT)'}")
    if settings.management_keys:
        if request.state.role != "management":
            raise Unauthorized(
                f"send a management key as 'Authorization: Bearer <key>' (PVT_MANAGEMENT_KEYS){_misplaced(request)}"
            )
        request.state.manager = "key"
    elif apart:
        if not on_unix:  # where no browser connects
            _refuse_pages(request, settings)
        request.state.manager = "port"
    else:
        raise Forbidden(
            "management is off; set PVT_MANAGEMENT_KEYS to one or more keys, or PVT_MANAGEMENT_PORT to turn it on"
        )


async def require_one_process(settings: SettingsDep) -> None:
    """Refuse, where there are several workers: each has its own models, and a request reaches any of them."""
    if settings.workers > 1:
        raise Forbidden(
            f"PVT_WORKERS is {settings.workers} and each worker has its own models, so this would change one of them "
            "only; use PVT_PRELOAD and PVT_PINNED, and aliases, which every worker follows"
        )


@contextmanager
def audited(request: Request, engine: Engine, action: str, **what: str) -> Iterator[None]:
    """Write a log line about who did what, whether it succeeds or not. A shutdown waits for it."""
    client = request.client.host if request.client else None
    who = {"by": request.state.manager, "client": client, "request_id": request.state.request_id}
    try:
        with engine.request():
            yield
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("management", action=action, **what, **who, outcome="failed", reason=reason)
        raise
    log.info("management", action=action, **what, **who, outcome="done")


def _refuse_pages(request: Request, settings: Settings) -> None:
    """A web page of another site must not use its reader's browser to reach a port that requires no key."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    name = urlsplit(f"//{host}").hostname or ""
    try:
        if name not in {"localhost", settings.management_host}:
            ip_address(name)
    except ValueError:
        raise Forbidden(
            f"Host {host!r} is no address; reach the management port by its address, or set PVT_MANAGEMENT_KEYS"
        ) from None
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden(f"a page of {origin!r} may not use the management port, which requires no key")
