"""Sends HTTP requests at times fixed beforehand over keep-alive connections, opening another when none is idle.

On asyncio's own loop: its clock is exact and its timers at most a millisecond late, never early; uvloop's go by a clock
of whole milliseconds.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from urllib.parse import urlsplit

import httptools

from bench.bodies import Body

CONNECTIONS = 1000
DRAIN_SECONDS = 10.0


@dataclass(slots=True)
class Call:
    """One request: when it was to leave and when its answer was there, on the loop's clock; status 0: broken."""

    request: bytes
    intended: float
    lag: float = 0.0
    finished: float | None = None
    status: int = 0


class _Connection(asyncio.Protocol):
    """Carries one call at a time."""

    def __init__(self, generator: "Generator") -> None:
        self._generator = generator
        self._transport: asyncio.Transport | None = None
        self.call: Call | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # of a TCP connection
        self._generator.connected(self)

    def send(self, call: Call) -> None:
        assert self._transport  # noqa: S101  only connected ones are asked to
        self.call = call
        self._transport.write(call.request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        reusable = self._parser.should_keep_alive()
        call, self.call = self.call, None
        status = self._parser.get_status_code()
        self._parser = httptools.HttpResponseParser(self)
        if call:
            self._generator.answered(call, status)
        if reusable:
            self._generator.idle(self)
        elif self._transport:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's signature
        self._generator.lost(self)


class Generator:
    """Sends `calls` at their times to `host` and `port`."""

    def __init__(self, host: str, port: int, calls: Sequence[Call]) -> None:
        self._host, self._port, self._calls = host, port, calls
        self._loop = asyncio.get_running_loop()
        # All that changes: what waits for a connection, connections by their state, and calls not yet finished.
        self._waiting: deque[Call] = deque()
        self._idle: list[_Connection] = []
        self._open = self._connecting = 0
        self._left = len(calls)
        self._done = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Return when all calls are finished, or `drain_seconds` after the last one's time."""
        for call in self._calls:
            self._loop.call_at(call.intended, self._due, call)
        if self._calls:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._done.wait(), self._calls[-1].intended + drain_seconds - self._loop.time())

    def connected(self, connection: _Connection) -> None:
        """It can carry a call."""
        self._connecting -= 1
        self.idle(connection)

    def idle(self, connection: _Connection) -> None:
        """It can carry a call again."""
        if self._waiting:
            connection.send(self._waiting.popleft())
        else:
            self._idle.append(connection)

    def answered(self, call: Call, status: int) -> None:
        """`call` is over."""
        call.finished, call.status = self._loop.time(), status
        self._left -= 1
        if not self._left:
            self._done.set()

    def lost(self, connection: _Connection) -> None:
        """It is closed, with whatever it carried."""
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.call:
            self.answered(connection.call, 0)
        self._connect()

    def _due(self, call: Call) -> None:
        call.lag = self._loop.time() - call.intended
        if self._idle:
            self._idle.pop().send(call)
        else:
            self._waiting.append(call)
            self._connect()

    def _connect(self) -> None:
        while len(self._waiting) > self._connecting and self._open < CONNECTIONS:
            self._open += 1
            self._connecting += 1
            task = self._loop.create_task(self._open_one())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _open_one(self) -> None:
        try:
            await self._loop.create_connection(lambda: _Connection(self), self._host, self._port)
        except OSError:
            self._open -= 1
            self._connecting -= 1
            if self._waiting:
                self.answered(self._waiting.popleft(), 0)


async def drive(
    url: str, bodies: Sequence[Body], times: Sequence[float], start: float, drain_seconds: float = DRAIN_SECONDS
) -> list[Call]:
    """Post `bodies` in turn to `url`, each at `start` (on the loop's clock) plus its one of `times`."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    requests = [_request(f"{host}:{port}", path, body) for body in bodies]
    calls = [Call(request, start + time) for time, request in zip(times, cycle(requests), strict=False)]
    await Generator(host, port, calls).run(drain_seconds)
    return calls


def _request(host: str, path: str, body: Body) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {body.content_type}\r\n"
        f"Content-Length: {len(body.data)}\r\n\r\n"
    )
    return head.encode() + body.data
