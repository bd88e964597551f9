"""Around every request: its id, its log line, its metrics, its `Server-Timing`. Pure ASGI."""

import asyncio
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from random import getrandbits
from time import perf_counter
from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems
from app.clients import Clients
from app.connections import PROBES
from app.dependencies import State
from app.metrics import SERVER_ERRORS, HttpMetrics
from app.problems import CLIENT_CLOSED_REQUEST, ClientLimitExceeded
from app.proxies import Proxies
from app.routes.inference import InferenceRoute
from app.stats import STREAM
from app.tracing import Tracing
from service.errors import ShuttingDown
from service.memory import ANSWERS, Reservation

log = structlog.get_logger(component="access")

PIECE_BYTES = 65_536  # of a body; more at once, and the server would hold it for a client that does not read
_UNLIMITED = nullcontext()
_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_PROBES = PROBES | {"/stats", STREAM}  # scrapers and pages request these every few seconds, as probes are
_PAGE_FILES = "/static/"  # a dozen for one look at the page, from memory


class _Exchange:
    """The messages of a request and its response: counted, and given what every response has."""

    __slots__ = ("_receive", "_send", "_state", "received", "sent", "status")

    def __init__(self, state: dict[str, Any], receive: Receive, send: Send) -> None:
        self._state = state
        self._receive = receive
        self._send = send
        # Mutable state: the response's status, once it has begun; the bytes of both bodies.
        self.status = CLIENT_CLOSED_REQUEST
        self.received = 0
        self.sent = 0

    async def receive(self) -> Message:
        """See the ASGI specification."""
        message = await self._receive()
        self.received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """See the ASGI specification; nothing of a body goes out in response to HEAD."""
        if self._state["method"] == "HEAD":
            message = {**message, "body": b""}
        size = len(message.get("body", b""))
        self.sent += size
        if message["type"] == "http.response.start":
            _reserve(message, self._state)
            self.status = message["status"]
            _add_headers(message, self._state)
        elif size > PIECE_BYTES:
            await _send_in_pieces(message, self._send)
            return
        await self._send(message)


class RequestContext:
    """Gives each request an id and a log line, and counts it, whatever its outcome."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        clients: Clients,
        proxies: Proxies,
        *,
        health_route: str = "",
        slow_seconds: float = 0.0,
        direct: Iterable[InferenceRoute] = (),
    ) -> None:
        """`direct`: routes whose requests go there past the framework, which would double what their way takes."""
        self._direct = {route.path: route for route in direct}
        self._app = app
        self._metrics = metrics
        self._clients = clients
        self._proxies = proxies
        self._probes = _PROBES | {health_route}
        self._slow_seconds = slow_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            scope.setdefault("state", {})
            await self._app(scope, receive, send)
            return
        state = self._begun(scope)
        state["method"] = method = scope["method"]
        # Whatever has a GET has a HEAD. The server knows by its own scope that no body follows.
        scope = {**scope, "method": "GET"} if method == "HEAD" else scope
        exchange = _Exchange(state, receive, send)
        has_key, traffic = state["client"] in self._clients.usage, self._metrics.traffic
        active = self._metrics.active(method, scope.get("scheme", "http"))
        counted = state["path"] not in self._probes
        tracing: Tracing | None = state["tracing"]
        traced = tracing.begin(scope) if tracing and counted else None
        traffic.in_flight += counted
        active.inc()
        try:
            with self._limited(scope):
                route = self._direct.get(scope["path"]) if method == "POST" else None
                if route:
                    scope["route"] = route
                await (route.app if route else self._app)(scope, exchange.receive, exchange.send)
        except (Exception, asyncio.CancelledError) as error:
            if exchange.status != CLIENT_CLOSED_REQUEST:  # the response has begun and can't be taken back
                state["exception"] = type(error).__qualname__
                raise
            # Here, and not in the framework's outermost layer, so that this response too has its headers and its line.
            response = await _failure(scope, error)
            await response(scope, receive, exchange.send)
            error.__traceback__ = None  # whose frames lead to results that have this error in them, and to the images
        finally:
            if held := state.get("answer"):
                held.release()
            traffic.in_flight -= counted
            active.dec()
            seconds = perf_counter() - state["arrived"]
            received, sent = exchange.received, exchange.sent
            if has_key:
                self._clients.usage.record(state["client"], state.get("images", 0), received, sent, seconds)
            noted = self._record(scope, method, exchange.status, seconds, received=received, sent=sent)
            if tracing and traced:
                noted["address"] = self._clients.address(scope)
                tracing.end(traced, scope, exchange.status, noted)

    def _begun(self, scope: Scope) -> dict[str, Any]:
        """The request's state, with its id and its client."""
        state: dict[str, Any] = scope.setdefault("state", {})
        if "engine" not in state:  # the server has no lifespan state, or this application is mounted below another one
            state.update(_started(scope))
        now = perf_counter()
        state["begin_seconds"] = now - state.setdefault("arrived", now)
        if self._proxies.are_there:
            self._proxies.place(scope)
        state["path"] = scope["path"].removeprefix(scope.get("root_path", ""))  # now: a mounted route changes the root
        state["request_id"] = request_id(scope)
        state["task"] = asyncio.current_task()  # for a shutdown, which may have to end it
        state["client"], state["role"] = self._clients.identify(scope)
        return state

    def _limited(self, scope: Scope) -> AbstractContextManager[None]:
        """Within the limits of its client; probes, scrapes, management and the files of the page have none."""
        limits, state = self._clients.limits, scope["state"]
        if not limits.are_set or state["role"] == "management":
            return _UNLIMITED
        if state["path"] in self._probes or state["path"] == "/" or state["path"].startswith(_PAGE_FILES):
            return _UNLIMITED
        return limits.admitted(state["client"], scope)

    def _record(self, scope: Scope, method: str, status: int, seconds: float, **sizes: int) -> dict[str, Any]:
        """Count and log a request; the fields of its line that every request has."""
        route, state = getattr(scope.get("route"), "path", "unmatched"), scope["state"]
        scheme, reason = scope.get("scheme", "http"), state.get("reason")
        names = {"request_id": state["request_id"]}
        if (trace := state.get("trace")) and trace.recorded:
            names = {**trace.ids, **names}
        self._metrics.record(route, method, status, seconds, scheme=scheme, names=names, reason=reason, **sizes)
        if route not in self._probes:
            self._metrics.traffic.answered(route, status, seconds)
        elif status < 400:  # noqa: PLR2004  the first status of errors
            return {}
        fields = {"ms": round(seconds * 1000, 2), "request_id": state["request_id"], "client": state["client"]}
        if state["role"]:  # else the address is the client's name
            fields["address"] = self._clients.address(scope)
        if scheme == "grpc":
            fields["protocol"] = "grpc"
        fields |= {"bytes_received": sizes["received"], "bytes_sent": sizes["sent"], **state.get("log", {})}
        if timing := state.get("timing"):
            fields["stages_ms"] = {name: round(value * 1000, 2) for name, value in timing.items() if name != "total"}
        slow = self._slow_seconds and seconds >= self._slow_seconds
        write = log.warning if slow or status >= SERVER_ERRORS else log.info
        write("request", method=method, path=state["path"], status=status, **fields)
        return fields


def _add_headers(message: Message, state: dict[str, Any]) -> None:
    """Add what every response has to its first message."""
    if state["engine"].leaving or state["engine"].draining:
        # So that no client sends its next request into a closing socket.
        MutableHeaders(scope=message)["Connection"] = "close"
    headers = message["headers"] = [*message.get("headers", ())]
    headers.append((b"x-request-id", state["request_id"].encode()))
    if cached := state.get("cache_status"):
        headers.append((b"cache-status", cached.encode()))
    if timing := state.get("timing"):
        timing["total"] = perf_counter() - state["arrived"]
        entries = ", ".join([f"{k};dur={v * 1000:.2f}" for k, v in timing.items()])
        headers.append((b"server-timing", entries.encode()))


def _route_of(scope: Scope) -> BaseRoute | None:
    """The endpoint that a request would have reached."""
    return next((route for route in scope["app"].routes if route.matches(scope)[0] == Match.FULL), None)


def _started(scope: Scope) -> State:
    """What the lifespan yielded, for a host that does not pass it on."""
    started: State | None = getattr(scope["app"].state, "started", None)
    if started is None:
        raise RuntimeError("the application was not started: its host must run `app.router.lifespan_context(app)`")
    return started


async def _failure(scope: Scope, error: Exception | asyncio.CancelledError) -> Response:
    """The response to what no handler knows; a cancellation goes on, unless a shutdown has ended the request."""
    if isinstance(error, ClientLimitExceeded):  # before the body was read, and an endpoint was found
        scope["route"] = _route_of(scope)
    if isinstance(error, problems.EXPECTED):
        return await problems.expected(Request(scope), error)
    if not isinstance(error, asyncio.CancelledError):
        return problems.unexpected(error, scope)
    if not scope["state"]["engine"].draining:
        raise error
    scope["state"]["task"].uncancel()
    stopped = ShuttingDown("the service stopped before this request was answered; send it again")
    return await problems.expected(Request(scope), stopped)


def _reserve(message: Message, state: dict[str, Any]) -> None:
    """Reserve memory for a whole body, of which `message` is the head, until it is sent; raises MemoryExhausted.

    What sends its body as it is made has reserved memory before, and announces no length.
    """
    for name, value in message.get("headers", ()):
        if name == b"content-length" and (length := int(value)) > PIECE_BYTES:
            held: Reservation = state.setdefault("answer", state["engine"].memory.reserve(0, ANSWERS))
            if held.count > length:
                held.shrink(held.count - length)
            else:
                held.grow(length - held.count)


async def _send_in_pieces(message: Message, send: Send) -> None:
    """Send a large piece of a body as fast as its client takes it: the server holds at most one of the pieces.

    The last one, which is empty, waits until the client has taken nearly all.
    """
    body = memoryview(message["body"])
    for start in range(0, len(body), PIECE_BYTES):
        piece = bytes(body[start : start + PIECE_BYTES])
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    if not message.get("more_body", False):
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def request_id(scope: Scope) -> str:
    """The client's own id where it is fit for a log line, a new one otherwise."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and (match := _REQUEST_ID.fullmatch(value.decode("latin-1"))):
            return match[0]
    return f"{getrandbits(128):032x}"
