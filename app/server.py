"""The process: uvicorn that drains before it closes."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from types import FrameType
from typing import cast

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app import systemd
from app.clients import Directory
from app.connections import Connections
from app.listening import url_of
from app.main import create_app
from app.protocol import BoundedProtocol
from app.settings import Settings
from app.starting import Starting
from app.watchdog import Watchdog
from app.workers import Worker

log = structlog.get_logger(component="server")

# How long clients may take to send another request on an open connection and get a response that closes it.
LINGER_SECONDS = 0.5
ACCEPTS_OF_A_WORKER = 8  # connections in one turn of the event loop
# How long after the signal an upload may go on, at most half of the drain: what it carries must still be worked on.
UPLOAD_SECONDS = 5.0
_POLL_SECONDS = 0.01
# Until a thread that computes in Python lets another one on: under load each image waits for that some five times.
SWITCH_SECONDS = 0.001


def run(
    settings: Settings,
    listeners: Sequence[socket.socket],
    management: Sequence[socket.socket] = (),
    worker: Worker | None = None,
    *,
    starting: Starting,
) -> None:
    """Serve on `listeners`, and `management` on others, until a signal stops it; as `worker`, if there are several.

    `starting` ends the process at signals until uvicorn handles them.

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
        proxy_headers=False,  # `app/clients.py` reads them
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=1,  # after a drain
    )
    # What libraries made is never garbage: measuring a model's memory then looks through the rest only, and holds up
    # requests for some milliseconds instead of a hundred.
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)
    started_event = "listening" if worker is None else "worker_listening"
    connections = _connections(settings, worker)
    urls = {name: url_of(each[0]) for name, each in (("url", listeners), ("management", management)) if each}
    server = DrainingServer(
        config, started_event, urls, settings, connections, starting=starting, notifies=worker is None
    )
    server.run(sockets=[*listeners, *management])


def _connections(settings: Settings, worker: Worker | None) -> Connections:
    # Workers share the queue of new connections: one that takes few at a time leaves some to the others.
    share = {} if worker is None else {"accepts_per_turn": ACCEPTS_OF_A_WORKER}
    directory = Directory(settings)
    return Connections(
        client_seconds=settings.client_timeout_seconds,
        identify=lambda scope: directory.identify(scope)[0],
        root_path=settings.root_path,
        health_route=settings.health_route,
        cors_origins=settings.cors_origins,
        **share,
    )


def leave() -> None:
    """End the process if a load that was abandoned, or a thread that is stuck, would keep it from ending."""
    if any(thread.name.startswith("pvt-") for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(0)


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: refuse new work with a clear response, finish what is under way, then close and exit 0.

    Uvicorn alone closes its socket and every idle connection at once, on which a client may just have sent something.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        started_event: str,
        urls: Mapping[str, str],
        settings: Settings,
        connections: Connections,
        *,
        starting: Starting,
        notifies: bool,
    ) -> None:
        """`started_event` is the name of the log line when it listens, which has `urls`; systemd hears of it too."""
        super().__init__(config)
        self.server_state: Connections = connections
        self._started_event = started_event
        self._urls = urls
        self._drain_seconds = settings.shutdown_seconds
        self._delay_seconds = settings.drain_delay_seconds
        self._starting = starting
        self._notifies = notifies
        # Mutable state: the signals that came since it listens, the drain that the first one began, and what ends a
        # process that is stuck.
        self._signals: list[int] = []
        self._draining: asyncio.Task[None] | None = None
        self._watchdog: Watchdog | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then log where."""
        self._starting.over()  # uvicorn's handlers are in place
        await super().startup([])  # which would accept one connection in each turn of the event loop
        if self.started and sockets:
            protocol = partial(BoundedProtocol, self.config, self.server_state, self.lifespan.state)
            self.server_state.listen(sockets, protocol)
            engine = self.lifespan.state["engine"]
            options, budget = engine.options, engine.memory.limit // 1_000_000
            log.info(
                self._started_event,
                **self._urls,
                instances=options.instances,
                cores=options.cores,
                memory_budget_mb=budget,
            )
            self._watchdog = Watchdog(engine, self._end_stuck, notifies=self._notifies)
            self._watchdog.start()
            if self._notifies:
                systemd.notify("READY=1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is left."""
        await super().shutdown(sockets)
        if self._watchdog:
            self._watchdog.close()

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
            self._give_up()
            return True
        return self._draining is not None and self._draining.done()

    async def _drain(self) -> None:
        """After PVT_DRAIN_DELAY_SECONDS, refuse new work; let what has begun send its last byte, within the limit."""
        sig = signal.Signals(self._signals[0])
        if self._notifies:
            systemd.notify("STOPPING=1")
        if self._delay_seconds and sig == signal.SIGTERM:  # Ctrl-C is a person's, who waits
            self.lifespan.state["engine"].leaving = True
            log.info("leaving", signal=sig.name, seconds=self._delay_seconds)
            await asyncio.sleep(self._delay_seconds)
        log.info("draining", signal=sig.name)
        end = asyncio.get_running_loop().time() + self._drain_seconds
        uploads = asyncio.create_task(self._end_uploads())
        try:
            async with asyncio.timeout_at(end):
                await asyncio.gather(self.lifespan.state["engine"].drain(), _ended({*self.server_state.tasks}))
        except TimeoutError:
            log.warning("drain_timeout", seconds=self._drain_seconds, requests=len(self.server_state.tasks))
            self._give_up()
        else:
            await asyncio.sleep(LINGER_SECONDS)
        await self.server_state.stop_listening()
        await self._close(end)
        uploads.cancel()

    async def _end_uploads(self) -> None:
        """Answer 503 to the requests whose bodies are not complete in time: nothing was done for them yet."""
        await asyncio.sleep(min(UPLOAD_SECONDS, self._drain_seconds / 2))
        # The cycle is the connection's youngest request. One that waits for others before it has no task yet, and is
        # refused once it has.
        for connection in cast("set[BoundedProtocol]", self.server_state.connections):
            cycle = cast("RequestResponseCycle | None", connection.cycle)  # None before the first request
            task = cycle and cycle.scope["state"].get("task")
            if cycle and task and cycle.more_body and not cycle.response_started:
                task.cancel()

    def _give_up(self) -> None:
        """Answer 503 to the requests that are left; responses that have begun are cut off."""
        self.lifespan.state["engine"].abort()
        for task in self.server_state.tasks:
            if not task.cancelling():
                task.cancel()

    async def _end_stuck(self) -> None:
        """Answer 503 to all requests under way, to the last byte: the process ends with a thread that is stuck."""
        await self.server_state.stop_listening()
        self._give_up()
        await _ended({*self.server_state.tasks})
        await self._close(asyncio.get_running_loop().time() + LINGER_SECONDS)

    async def _close(self, end: float) -> None:
        """Wait until each connection is closed by the response to the last request of its client.

        One on which nothing more is to be sent has LINGER_SECONDS, one on which something is has until `end`.
        """
        loop = asyncio.get_running_loop()
        idle_end = loop.time() + LINGER_SECONDS
        while self.server_state.connections and (  # noqa: ASYNC110  uvicorn has no event for it
            (now := loop.time()) < idle_end or (now < end and self._is_answering())
        ):
            await asyncio.sleep(_POLL_SECONDS)

    def _is_answering(self) -> bool:
        """Whether a request is being answered, or a client has not read all of a response."""
        connections = cast("set[BoundedProtocol]", self.server_state.connections)
        return bool(self.server_state.tasks or self.server_state.waiting) or any(
            each.transport.get_write_buffer_size() for each in connections
        )


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    if tasks:
        await asyncio.wait(tasks)
