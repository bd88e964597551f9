"""One request of the application from inside the process, and its outcome in gRPC's terms."""

import asyncio
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc
import orjson
import structlog
from starlette.types import ASGIApp, Message

from app.problems import problem
from service.errors import MemoryExhausted, ServiceError

log = structlog.get_logger(component="grpc")

Metadata = tuple[tuple[str, str], ...]
_RETURNED = frozenset({"cache-status", "retry-after", "server-timing", "x-request-id"})
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
OK = 200
_MOST_DETAILS = 2000  # characters; clients take 8 KB of metadata


def _code(status: int) -> grpc.StatusCode:
    return grpc.StatusCode.OK if status == OK else _CODES.get(status, grpc.StatusCode.INTERNAL)


class Answer(NamedTuple):
    """The application's response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def metadata(self) -> Metadata:
        """What of its headers goes into the trailing metadata."""
        return tuple((key, value) for key, value in self.headers.items() if key in _RETURNED)

    @property
    def code(self) -> grpc.StatusCode:
        """Its status in gRPC's terms."""
        return _code(self.status)

    @property
    def details(self) -> str:
        """What went wrong."""
        return str(orjson.loads(self.body)["error"])[:_MOST_DETAILS] if self.body else f"status {self.status}"


class Exchange:
    """One request of the application. Its end waits for `sent`, so that memory for the response is held until then."""

    def __init__(self, app: ASGIApp, scope: dict[str, Any], body: bytes) -> None:
        self._body: bytes | None = body
        self._state: dict[str, Any] = scope["state"]
        self._pieces: list[bytes] = []
        self._status, self._headers = 0, dict[str, str]()
        self._gone = asyncio.Event()
        self.sent = asyncio.Event()
        self._answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._run(app, scope))

    async def answer(self) -> Answer:
        """The response; whoever is cancelled while waiting for it has gone, and the application is told."""
        try:
            return await asyncio.shield(self._answer)
        except asyncio.CancelledError:
            self._gone.set()
            raise

    async def _run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001  the application has logged it
            log.warning("call_failed", reason=str(error))
        finally:
            if not self._answer.done():
                self._answer.set_result(Answer(self._status or 500, self._headers, b""))

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._state["grpc_status"] = _code(self._status).name  # for the trace
            self._headers = {key.decode().lower(): value.decode("latin-1") for key, value in message["headers"]}
            return
        self._pieces.append(message.get("body", b""))
        if not message.get("more_body", False) and not self._answer.done():
            self._answer.set_result(Answer(self._status, self._headers, b"".join(self._pieces)))
            self._pieces.clear()
            await self.sent.wait()


def outcome_of(error: Exception) -> tuple[grpc.StatusCode, str, Metadata]:
    """What a client learns of an error outside of the application: of one that is not ours nothing; the log has it."""
    known = problem(error)
    if not isinstance(error, ServiceError):
        log.error("unexpected_error", exc_info=error)
    retry = (("retry-after", "2"),) if isinstance(error, MemoryExhausted) else ()
    return _CODES.get(known.status, grpc.StatusCode.INTERNAL), known.detail[:_MOST_DETAILS], retry


def address(peer: str) -> tuple[str, int] | None:
    """From gRPC's form, such as `ipv4:127.0.0.1:1234` or `ipv6:%5B::1%5D:1234`; None of a Unix socket."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return None
    host, _, port = rest.rpartition(":")
    return host.strip("[]"), int(port)
