"""The process: uvicorn, told to drain before it closes."""

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, cast

import structlog
import uvicorn

from app.main import create_app
from app.member import Member
from app.protocol import BoundedProtocol
from app.settings import Settings

log = structlog.get_logger(component="server")

# How long callers may take to come back on connections that are open and be told there to close them.
LINGER_SECONDS = 0.5


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: refuse new work with a clear answer, finish what is under way, then close and exit 0.

    Uvicorn alone closes its socket and every idle connection at once, on which a caller may just have sent something.
    """

    def __init__(self, config: uvicorn.Config, started_event: str) -> None:
        """`started_event` is what the log calls it when it listens."""
        super().__init__(config)
        self._started_event = started_event
        # Mutable state: the loop once it listens, whether a signal came, and what that set going.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say where."""
        await super().startup(sockets)
        if self.started:
            self._loop = asyncio.get_running_loop()
            url, *management = [_url(server.sockets[0]) for server in self.servers]
            options = self.lifespan.state["engine"].options
            told = {"management": management[0]} if management else {}
            log.info(self._started_event, url=url, **told, instances=options.instances, cores=options.cores)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; stop at once at the second."""
        if self._loop is None:
            super().handle_exit(sig, frame)
            return
        # Nothing more here: whatever the signal interrupted may hold a lock, the log's for one.
        self._loop.call_soon_threadsafe(self._stop_now if self._stopping else self._begin_drain, sig)
        self._stopping = True

    def _begin_drain(self, sig: int) -> None:
        self._draining = asyncio.create_task(self._drain(sig))

    def _stop_now(self, sig: int) -> None:
        if self._draining:
            self._draining.cancel()
        self.lifespan.state["engine"].abort()
        self._end(sig)

    def _end(self, sig: int) -> None:
        self.config.timeout_graceful_shutdown = 1  # what had its time has had it
        super().handle_exit(sig, None)

    async def _drain(self, sig: int) -> None:
        log.info("draining", signal=signal.Signals(sig).name)
        engine = self.lifespan.state["engine"]
        try:
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                await engine.drain()
                await asyncio.sleep(LINGER_SECONDS)
        except TimeoutError:
            log.warning("drain_timeout", seconds=self.config.timeout_graceful_shutdown)
            engine.abort()
        await self._accept_the_last()
        await self._last_answers()
        self._end(sig)

    async def _accept_the_last(self) -> None:
        """Stop listening, but take every connection that the kernel has accepted: closing the socket resets those."""
        loop = asyncio.get_running_loop()
        for server in self.servers:
            listeners = [socket.socket(fileno=os.dup(each.fileno())) for each in server.sockets]
            server.close()
            accepted = [connection for listener in listeners for connection in _accept_all(listener)]
            for connection in accepted:
                await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        """What uvicorn makes for each connection."""
        make = cast("type[Any]", self.config.http_protocol_class)
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    async def _last_answers(self) -> None:
        """Wait until the connections that are left are closed, each by the answer to what its caller sent last."""
        loop = asyncio.get_running_loop()
        end = loop.time() + LINGER_SECONDS
        while self.server_state.connections and loop.time() < end:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(LINGER_SECONDS / 50)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"


def _accept_all(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait for `listener`, which is closed at once behind the last of them."""
    with listener, suppress(BlockingIOError):
        listener.setblocking(False)  # noqa: FBT003  the standard library's own signature
        while True:
            yield listener.accept()[0]


def run(settings: Settings, *listeners: socket.socket, member: Member | None = None) -> None:
    """Serve on `listeners` until a signal asks to stop; as `member`, if there are others."""
    config = uvicorn.Config(
        create_app(settings, member),
        loop="uvloop",
        http=BoundedProtocol,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing here depends on who the caller is
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    # Uvicorn raises the signal again once it is done; a stop that was asked for is no failure.
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: None)
    # What libraries made is never garbage: measuring a model's memory then looks through the rest only, and holds up
    # requests for some milliseconds instead of a hundred.
    gc.freeze()
    DrainingServer(config, "listening" if member is None else "worker_listening").run(sockets=list(listeners))
    if any(thread.name.startswith("pvt-") for thread in threading.enumerate()):
        # A load that was given up, or a thread that is stuck: the interpreter would wait for it.
        logging.shutdown()
        os._exit(0)
