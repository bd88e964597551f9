"""All open connections of a process: how they are accepted, bounded, watched, and how their requests begin."""

import asyncio
import os
import resource
import socket
from collections import deque
from collections.abc import Callable, Sequence
from heapq import nsmallest
from time import perf_counter
from typing import Protocol

import structlog
from starlette.types import Scope
from uvicorn.server import ServerState

log = structlog.get_logger(component="http")

MAX_CONNECTIONS = 16_384  # an open connection takes some 6 kB
RESERVED_DESCRIPTORS = 256  # for models, stores, logs and images by URL; a quarter of what there is, if that is less
FEW_DESCRIPTORS = 1024
SWEEP_SECONDS = 0.5
LOG_SECONDS = 10.0  # between two log lines about connections that were closed for others
ACCEPTS_PER_TURN = 64  # connections that one turn of the event loop accepts
BEGUN_PER_TURN = 4  # requests that one turn of the event loop begins
# Their requests begin before those of others: they cost little, an orchestrator restarts who does not answer, and who
# watches an overload must see it.
PROBES = frozenset(
    {"/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/ping", "/metrics"}
)
_RETRY_SECONDS = 0.05  # until it is tried again to accept, where no connection can be closed


class Connection(Protocol):
    """What this module knows of a connection's protocol."""

    def watch(self, seconds: float) -> None:
        """Time passed."""

    def expendability(self) -> tuple[int, float] | None:
        """How badly it is needed, the least one first; None while the service works on its request."""

    def evict(self) -> None:
        """Close it at once."""


def descriptor_limit() -> int:
    """Raise this process's limit of open files as far as it may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # macOS says that there is no limit and then has one
            hard = soft
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


class Connections(ServerState):
    """The connections of one process (decisions 57 to 59).

    - Those that wait in the kernel are accepted many at a time. Beyond the limit, the least needed one is closed: one
      that sends nothing, the longest silent first; never one whose request is being worked on.
    - Every half second each is told how much time passed. A time in which this process did not run does not count.
    - One turn of the event loop begins a few requests, of each client in turn: who has many waits for its own.
    """

    def __init__(
        self,
        *,
        client_seconds: float,
        identify: Callable[[Scope], str],
        root_path: str = "",
        health_route: str = "",
        cors_origins: Sequence[str] = (),
        accepts_per_turn: int = ACCEPTS_PER_TURN,
    ) -> None:
        """`client_seconds`: how long a client may take, see `Settings.client_timeout_seconds`.

        `identify` names the client of a request. `root_path` is what the paths of probes may begin with;
        `health_route` is one more of them.
        `cors_origins`: whose pages may read refusals, see `Settings.cors_origins`.
        """
        super().__init__()
        self._identify = identify
        self.client_seconds = client_seconds
        self.cors_origins = cors_origins
        paths = PROBES | ({health_route} - {""})
        self.probes = paths | {root_path + each for each in paths}
        self.limit = MAX_CONNECTIONS
        self._accepts_per_turn = accepts_per_turn
        # Mutable state: the listening sockets, what is accepted and has no transport yet, the requests begun in this
        # turn, those of each client that wait for the next one, and what the log does not know yet.
        self._listeners: list[socket.socket] = []
        self._opening: set[asyncio.Task[object]] = set()
        self._begun = 0
        self.waiting: dict[str, deque[Callable[[], None]]] = {}
        self._evicted = 0
        self._logged = float("-inf")
        self._sweeping: asyncio.TimerHandle | None = None

    def listen(self, listeners: list[socket.socket], protocol: Callable[[], asyncio.Protocol]) -> None:
        """Accept connections from `listeners` and watch them, until `stop_listening`."""
        files = descriptor_limit()
        used = len(os.listdir("/dev/fd"))  # noqa: PTH208  the count is all that matters
        self.limit = max(8, min(MAX_CONNECTIONS, files - used - min(RESERVED_DESCRIPTORS, files // 4)))
        if files < FEW_DESCRIPTORS:
            log.warning("few_descriptors", limit=files, connections=self.limit, advice="raise `ulimit -n`")
        loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._listeners = listeners
        for listener in listeners:
            listener.setblocking(False)  # noqa: FBT003  the standard library's own signature
            loop.add_reader(listener, self._accept, listener, self._accepts_per_turn)
        self._swept = loop.time()
        self._sweeping = loop.call_later(SWEEP_SECONDS, self._sweep)

    async def stop_listening(self) -> None:
        """Accept what the kernel has accepted, since closing a socket resets that, and close the sockets."""
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
            last = socket.socket(fileno=os.dup(listener.fileno()))
            listener.close()
            with last:
                while self._accept(last, self._accepts_per_turn):  # noqa: ASYNC110  there is no event
                    await asyncio.sleep(0)
        self._listeners = []
        if self._opening:
            await asyncio.wait(self._opening)

    def close(self) -> None:
        """Watch no longer."""
        if self._sweeping:
            self._sweeping.cancel()

    def begin(self, start: Callable[[], None], scope: Scope, *, first: bool) -> None:
        """Call `start`, which begins the request of `scope`: now if it is to be `first` or few have begun, else later.

        Those that wait are begun in the order of each client, and one of each client after another. The state of their
        scope has the time of their arrival, on `perf_counter`.
        """
        if first or (self._begun < BEGUN_PER_TURN and not self.waiting):
            if not self._begun:
                asyncio.get_running_loop().call_soon(self._next_turn)
            self._begun += 1
            start()
        else:
            scope["state"]["arrived"] = perf_counter()
            self.waiting.setdefault(self._identify(scope), deque()).append(start)

    def _next_turn(self) -> None:
        self._begun = 0
        while self.waiting and self._begun < BEGUN_PER_TURN:
            self._begun += 1
            client = next(iter(self.waiting))
            starts = self.waiting.pop(client)
            starts.popleft()()
            if starts:
                self.waiting[client] = starts  # behind those of others
        if self._begun:
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _accept(self, listener: socket.socket, count: int) -> bool:
        """Accept up to `count` connections; whether more may wait."""
        loop = asyncio.get_running_loop()
        for _ in range(count):
            if len(self.connections) + len(self._opening) > self.limit:
                # For the last one. While some open they count twice for a moment: the next turn knows.
                return bool(self._opening) or self._make_room(listener)
            try:
                accepted, _address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return False
            except ConnectionError:
                continue  # it was closed before it was accepted
            except OSError as error:  # no descriptor or memory is left
                self._log_rarely("accept_failed", reason=str(error))
                return self._make_room(listener)
            accepted.setblocking(False)  # noqa: FBT003  as above
            opening: asyncio.Task[object] = loop.create_task(loop.connect_accepted_socket(self._protocol, accepted))
            self._opening.add(opening)
            opening.add_done_callback(self._opened)
        return True

    def _opened(self, opening: "asyncio.Task[object]") -> None:
        self._opening.discard(opening)
        if not opening.cancelled() and (error := opening.exception()):
            log.warning("connection_failed", reason=str(error))

    def _make_room(self, listener: socket.socket) -> bool:
        """Close the least needed connections, a few at a time since finding them takes a look at all of them."""
        found = [
            (expendability, id(connection), connection)
            for connection in self.connections
            if (expendability := connection.expendability()) is not None  # type: ignore[union-attr]
        ]
        victims = nsmallest(max(1, self.limit // 64), found)
        for *_, victim in victims:
            victim.evict()  # type: ignore[union-attr]
        self._evicted += len(victims)
        self._log_rarely("connections_exhausted", advice="raise `ulimit -n`")
        loop = asyncio.get_running_loop()
        if not victims and listener in self._listeners:
            loop.remove_reader(listener)
            loop.call_later(_RETRY_SECONDS, self._accept_again, listener)
        return bool(victims)

    def _log_rarely(self, event: str, **why: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._logged > LOG_SECONDS:
            self._logged = now
            log.warning(event, limit=self.limit, open=len(self.connections), closed_for_others=self._evicted, **why)
            self._evicted = 0

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners and listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener, self._accepts_per_turn)

    def _sweep(self) -> None:
        """Tell every connection of the time since the last sweep, of which a pause of this process is no part."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        seconds, self._swept = min(now - self._swept, 2 * SWEEP_SECONDS), now
        self._sweeping = loop.call_later(SWEEP_SECONDS, self._sweep)
        for connection in list(self.connections):
            connection.watch(seconds)  # type: ignore[union-attr]
