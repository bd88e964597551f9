"""What `GET /stats` shows: the last minute of the service, as one object, summed over all of its processes.

A process keeps counts by second (`service.recent`), and latencies as a histogram of narrow bins. Of several workers
each writes its own share once a second where the others can read it (`app.workers`).
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from importlib.metadata import version
from math import exp, floor, log
from time import monotonic, time
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field

from app.problems import CLIENT_CLOSED_REQUEST, TooManyStreams
from service.engine import Engine
from service.machine import resident_bytes
from service.recent import Recent
from service.scheduling.lanes import QueueDepth

STREAM = "/stats/stream"
TICK_SECONDS = 1.0
MOST_STREAMS = 256  # of a process
BATCHES = 20
_FIRST_SECONDS, _STEP = 1e-4, log(1.05)  # bins of latency are 5 % wide
_REFUSED = frozenset({429, 503})
_NO_MISTAKES = _REFUSED | {CLIENT_CLOSED_REQUEST}  # of the client
_SERVER_ERRORS = 500
VERSION = version("pvt-serve")


class RouteStats(BaseModel):
    """A route's requests in the last minute; percentiles are within 3 %. Probes and stats are left out."""

    route: str
    requests: int
    per_second: float
    client_errors: Annotated[int, Field(description="Statuses 400 to 498, without 429.")]
    abandoned: Annotated[int, Field(description="Their clients disconnected before the answer (499 in the log).")]
    refused: Annotated[int, Field(description="429 and 503: send it again later.")]
    server_errors: Annotated[int, Field(description="Statuses from 500, without 503.")]
    p50_ms: float
    p99_ms: float


class QueueStats(BaseModel):
    """A model's images now, by how far they are: waiting to be decoded, decoding, queued for an instance, running."""

    model: str
    waiting_decode: int
    decoding: int
    queued: int
    running: int
    capacity: Annotated[int, Field(description="PVT_QUEUE_SIZE, of all workers and input sizes; more get 429.")]


class BatchInfo(BaseModel):
    """A batch that an instance took: how long its oldest image had waited for that, and how long it ran."""

    at: Annotated[float, Field(description="When, in seconds since the epoch.")]
    model: str
    size: int
    reason: str
    wait_ms: float
    run_ms: Annotated[float | None, Field(description="null while it runs")]


class Instances(BaseModel):
    """How many batches run now, and how many can at most."""

    busy: int
    total: int


class BatchStats(BaseModel):
    """The batches of the last minute, and the newest ones, newest first."""

    batches: int
    images: int
    mean_size: float | None
    last: list[BatchInfo]


class MemoryStats(BaseModel):
    """Bytes: resident; what requests and loads have reserved, by what for, and may; what models take, and may."""

    resident_bytes: int
    reserved_bytes: dict[str, int]
    reservable_bytes: Annotated[int | None, Field(description="null: no limit")]
    models_bytes: dict[str, int]
    models_budget_bytes: Annotated[int | None, Field(description="PVT_MEMORY_BUDGET_MB; null: no limit")]


class Stats(BaseModel):
    """The service now, and in the last `window_seconds`."""

    version: str
    at: Annotated[float, Field(description="When, in seconds since the epoch.")]
    uptime_seconds: float
    workers: int
    window_seconds: Annotated[int, Field(description="A minute, or less just after the start.")]
    in_flight: Annotated[
        int, Field(description="Requests that have begun and are not answered in full; probes and stats are left out.")
    ]
    routes: list[RouteStats]
    queues: list[QueueStats]
    instances: Instances
    batches: BatchStats
    memory: MemoryStats


class Request(NamedTuple):
    """What is counted of a request that was answered: `bin` is that of its latency."""

    route: str
    status: int
    bin: int


class Traffic:
    """Requests that were answered lately, and how many are under way."""

    def __init__(self, recent: Recent[Request] | None = None) -> None:
        # Mutable state.
        self.recent = recent or Recent[Request]()
        self.in_flight = 0

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one."""
        self.recent.count(Request(route, status, floor(log(max(seconds, _FIRST_SECONDS) / _FIRST_SECONDS) / _STEP)))


class Share(BaseModel):
    """What one process knows; sums of these are the service's."""

    uptime_seconds: float
    window_seconds: int
    in_flight: int
    requests: list[tuple[Request, int]]
    queues: dict[str, QueueDepth]
    instances: Instances
    batches: dict[int, int]
    last: list[BatchInfo]
    memory: MemoryStats


def share_of(engine: Engine, traffic: Traffic, started: float) -> Share:
    """Of this process, which `started` then, on the monotonic clock."""
    activity, options = engine.activity(), engine.options
    offset = time() - activity.now
    last = [
        BatchInfo(
            at=round(offset + each.started, 3),
            model=each.model,
            size=each.size,
            reason=each.reason,
            wait_ms=_ms(each.waited_seconds),
            run_ms=None if each.run_seconds is None else _ms(each.run_seconds),
        )
        for each in activity.releases[:BATCHES]
    ]
    return Share(
        uptime_seconds=round(monotonic() - started, 1),
        window_seconds=traffic.recent.seconds,
        in_flight=traffic.in_flight,
        requests=[*traffic.recent.counts().items()],
        queues=activity.depths(),
        instances=Instances(busy=activity.busy, total=len(activity.instances)),
        batches=engine.recent_batches(),
        last=last,
        memory=MemoryStats(
            resident_bytes=resident_bytes(),
            reserved_bytes=engine.memory.reserved(),
            reservable_bytes=engine.memory.limit or None,
            models_bytes=engine.loaded_bytes(),
            models_budget_bytes=options.budget.bytes,
        ),
    )


def summed(shares: Sequence[Share]) -> Stats:
    """The service's, of what its processes know; the oldest one's time is the service's."""
    window = max(1, *(each.window_seconds for each in shares))
    batches, queues = Counter[int](), dict[str, QueueDepth]()
    for share in shares:
        batches.update(share.batches)
        for model, depth in share.queues.items():
            queues[model] = QueueDepth(*map(sum, zip(queues.get(model, QueueDepth()), depth, strict=True)))
    images = sum(size * number for size, number in batches.items())
    last = sorted((each for share in shares for each in share.last), key=lambda each: -each.at)
    return Stats(
        version=VERSION,
        at=round(time(), 3),
        uptime_seconds=max(each.uptime_seconds for each in shares),
        workers=len(shares),
        window_seconds=window,
        in_flight=sum(each.in_flight for each in shares),
        routes=_routes((counted for share in shares for counted in share.requests), window),
        queues=[QueueStats(model=model, **depth._asdict()) for model, depth in sorted(queues.items())],
        instances=Instances(
            busy=sum(each.instances.busy for each in shares), total=sum(each.instances.total for each in shares)
        ),
        batches=BatchStats(
            batches=batches.total(),
            images=images,
            mean_size=round(images / batches.total(), 2) if batches else None,
            last=last[:BATCHES],
        ),
        memory=_memory([each.memory for each in shares]),
    )


def _routes(counted: Iterable[tuple[Request, int]], window: int) -> list[RouteStats]:
    """The busiest first."""
    statuses: dict[str, Counter[int]] = {}
    bins: dict[str, Counter[int]] = {}
    for (route, status, number), count in counted:
        statuses.setdefault(route, Counter())[status] += count
        bins.setdefault(route, Counter())[number] += count

    def some(route: str, fits: Callable[[int], bool]) -> int:
        return sum(count for status, count in statuses[route].items() if fits(status))

    found = [
        RouteStats(
            route=route,
            requests=statuses[route].total(),
            per_second=round(statuses[route].total() / window, 2),
            client_errors=some(route, lambda it: 400 <= it < _SERVER_ERRORS and it not in _NO_MISTAKES),  # noqa: PLR2004
            abandoned=statuses[route][CLIENT_CLOSED_REQUEST],
            refused=some(route, lambda it: it in _REFUSED),
            server_errors=some(route, lambda it: it >= _SERVER_ERRORS and it not in _REFUSED),
            p50_ms=_percentile_ms(bins[route], 0.5),
            p99_ms=_percentile_ms(bins[route], 0.99),
        )
        for route in statuses
    ]
    return sorted(found, key=lambda each: (-each.requests, each.route))


def _percentile_ms(bins: Counter[int], part: float) -> float:
    """The middle of the bin below whose end are `part` of all."""
    left = part * bins.total()
    for number in sorted(bins):
        left -= bins[number]
        if left <= 0:
            break
    return _ms(_FIRST_SECONDS * exp((number + 0.5) * _STEP))


def _memory(shares: Sequence[MemoryStats]) -> MemoryStats:
    reserved, models = Counter[str](), Counter[str]()
    for each in shares:
        reserved.update(each.reserved_bytes)
        models.update(each.models_bytes)
    reservable, budgets = [each.reservable_bytes for each in shares], [each.models_budget_bytes for each in shares]
    return MemoryStats(
        resident_bytes=sum(each.resident_bytes for each in shares),
        reserved_bytes=dict(reserved),
        reservable_bytes=None if None in reservable else sum(filter(None, reservable)),
        models_bytes=dict(models),
        models_budget_bytes=None if None in budgets else sum(filter(None, budgets)),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


class StatsPage:
    """The stats as JSON, made at most once a second however many ask, and as a stream of events.

    It belongs to one event loop.
    """

    def __init__(self, engine: Engine, collect: Callable[[], Sequence[Share]]) -> None:
        """`collect` returns the shares of all processes."""
        self._engine = engine
        self._collect = collect
        # Mutable state: the last text, and when it was made; how many streams there are; what they wait for.
        self._text = b""
        self._made = 0.0
        self._streams = 0
        self._tick: asyncio.Event | None = None

    def text(self) -> bytes:
        """JSON, at most a second old."""
        now = monotonic()
        if not self._text or now - self._made >= TICK_SECONDS:
            self._text = summed(self._collect()).model_dump_json().encode()
            self._made = now
        return self._text

    def stream(self) -> AsyncIterator[bytes]:
        """A server-sent event at once, and one each second until the service shuts down.

        Raises:
            TooManyStreams: this process has `MOST_STREAMS`.
        """
        if self._streams >= MOST_STREAMS:
            raise TooManyStreams(f"{MOST_STREAMS} streams are open; use GET /stats", retry_after_seconds=TICK_SECONDS)
        return self._events()

    async def _events(self) -> AsyncIterator[bytes]:
        self._streams += 1
        try:
            while True:
                yield b"data: " + self.text() + b"\n\n"
                await self._next_tick()
                if self._engine.draining:
                    return
        finally:
            self._streams -= 1

    async def _next_tick(self) -> None:
        """All streams go on at the same time, so that one text serves them all."""
        if self._tick is None:
            self._tick = asyncio.Event()
            asyncio.get_running_loop().call_later(TICK_SECONDS, self._go_on)
        await self._tick.wait()

    def _go_on(self) -> None:
        if self._tick:
            self._tick.set()
            self._tick = None
