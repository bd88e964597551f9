"""Around every request: its id, its log line, its metrics, its `Server-Timing`. Pure ASGI."""

import re
from random import getrandbits
from time import perf_counter

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems
from app.metrics import HttpMetrics
from app.problems import CLIENT_CLOSED_REQUEST

log = structlog.get_logger(component="access")

_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_UNTIMED = frozenset({"/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/metrics"})


class RequestContext:
    """Gives each request an id and a log line, and counts it, whatever becomes of it."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = perf_counter()
        state = scope.setdefault("state", {})
        state["request_id"] = _request_id(scope)
        status = CLIENT_CLOSED_REQUEST

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if state["engine"].draining:
                    # So that no caller sends its next request into a closing socket.
                    MutableHeaders(scope=message)["Connection"] = "close"
                headers = message["headers"] = [*message.get("headers", ())]
                headers.append((b"x-request-id", state["request_id"].encode()))
                if timing := state.get("timing"):
                    timing["total"] = perf_counter() - start
                    told = ", ".join(f"{k};dur={v * 1000:.2f}" for k, v in timing.items())
                    headers.append((b"server-timing", told.encode()))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if status != CLIENT_CLOSED_REQUEST:  # the response has begun and can't be taken back
                raise
            # Here, and not in the framework's outermost layer, so that this response too has its headers and its line.
            await problems.unexpected(error, state["request_id"], scope["path"])(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, perf_counter() - start)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.record(route, scope["method"], status, seconds)
        if route in _UNTIMED and status < 400:  # noqa: PLR2004  what probes and scrapers ask every few seconds
            return
        log.info(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            ms=round(seconds * 1000, 2),
            request_id=scope["state"]["request_id"],
            **scope["state"].get("log", {}),
        )


def _request_id(scope: Scope) -> str:
    """The caller's own id where it is fit for a log line, a new one otherwise."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and (match := _REQUEST_ID.fullmatch(value.decode("latin-1"))):
            return match[0]
    return f"{getrandbits(128):032x}"
