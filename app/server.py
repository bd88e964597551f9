"""The process: uvicorn that drains before it closes."""

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from contextlib import suppress
from functools import partial
from types import FrameType

import structlog
import uvicorn

from app.main import create_app
from app.protocol import BoundedProtocol
from app.settings import Settings
from app.workers import Worker

log = structlog.get_logger(component="server")

# How long clients may take to send another request on an open connection and get a response that closes it.
LINGER_SECONDS = 0.5


def run(settings: Settings, *listeners: socket.socket, worker: Worker | None = None) -> None:
    """Serve on `listeners` until a signal stops it; as `worker`, if there are several.

    Raises:
        BackendUnavailable: the settings name a GPU that does not exist.
    """
    config = uvicorn.Config(
        create_app(settings, worker),
        loop="uvloop",
        http=BoundedProtocol,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing depends on who the client is
        timeout_graceful_shutdown=1,  # after a drain
    )
    # Uvicorn raises a signal that came while it started again once it is done; a requested stop is no failure.
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: None)
    # What libraries made is never garbage: measuring a model's memory then looks through the rest only, and holds up
    # requests for some milliseconds instead of a hundred.
    gc.freeze()
    started_event = "listening" if worker is None else "worker_listening"
    DrainingServer(config, started_event, settings.shutdown_seconds).run(sockets=list(listeners))
    if any(thread.name.startswith("pvt-") for thread in threading.enumerate()):
        # A load that was abandoned, or a thread that is stuck: the interpreter would wait for it.
        logging.shutdown()
        os._exit(0)


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: refuse new work with a clear response, finish what is under way, then close and exit 0.

    Uvicorn alone closes its socket and every idle connection at once, on which a client may just have sent something.
    """

    def __init__(self, config: uvicorn.Config, started_event: str, drain_seconds: float) -> None:
        """`started_event` is the name of the log line when it listens."""
        super().__init__(config)
        self._started_event = started_event
        self._drain_seconds = drain_seconds
        # Mutable state: the signals that came since it listens, and the drain that the first one began.
        self._signals: list[int] = []
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then log where."""
        await super().startup(sockets)
        if self.started:
            addresses = [server.sockets[0].getsockname()[:2] for server in self.servers]
            urls = dict(zip(("url", "management"), (f"http://{host}:{port}" for host, port in addresses), strict=False))
            engine = self.lifespan.state["engine"]
            options, budget = engine.options, engine.memory.limit // 1_000_000
            log.info(
                self._started_event, **urls, instances=options.instances, cores=options.cores, memory_budget_mb=budget
            )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the signal, nothing more: whatever it interrupted may hold a lock, the log's for one."""
        if self.started:
            self._signals.append(sig)
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Begin to drain at the first signal; True, which ends the server, when that is done or at the second."""
        await super().on_tick(counter)
        if self._signals and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        if self._draining and len(self._signals) > 1:
            self._draining.cancel()
            self.lifespan.state["engine"].abort()
            return True
        return self._draining is not None and self._draining.done()

    async def _drain(self) -> None:
        log.info("draining", signal=signal.Signals(self._signals[0]).name)
        engine = self.lifespan.state["engine"]
        try:
            async with asyncio.timeout(self._drain_seconds):
                await engine.drain()
                await asyncio.sleep(LINGER_SECONDS)
        except TimeoutError:
            log.warning("drain_timeout", seconds=self._drain_seconds)
            engine.abort()
        await self._accept_the_last()
        # Each remaining connection is closed by the response to the last request of its client.
        loop = asyncio.get_running_loop()
        end = loop.time() + LINGER_SECONDS
        while self.server_state.connections and loop.time() < end:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(LINGER_SECONDS / 50)

    async def _accept_the_last(self) -> None:
        """Stop listening, but take every connection that the kernel has accepted: closing the socket resets those."""
        accepted: list[socket.socket] = []
        for server in self.servers:
            listeners = [socket.socket(fileno=os.dup(each.fileno())) for each in server.sockets]
            server.close()
            for listener in listeners:
                with listener, suppress(BlockingIOError):
                    listener.setblocking(False)  # noqa: FBT003  the standard library's own signature
                    while True:
                        accepted.append(listener.accept()[0])
        protocol = partial(BoundedProtocol, self.config, self.server_state, self.lifespan.state)
        for connection in accepted:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)
