"""Who does what next: places, decoding, batches, instances, deadlines.

Synchronous, without a clock, thread or lock: `service.scheduling.scheduler` adds those. Times are seconds on the
caller's clock. A call's stages are `decode` (it waits for a thread, or is decoded), `queue` (it waits for an instance),
`infer` (it is in a batch) and `ended`. It may end at any of them: with a result, an error, or as its caller has gone.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Generic, Literal, Protocol, TypeVar

from service.errors import DeadlineExceeded, InvalidRequest, OutOfMemory, QueueFull, ShuttingDown
from service.execution.plan import BatchPlan
from service.metrics import EngineMetrics
from service.scheduling.queues import Batch, Item, Queue, Queues, ReleaseReason

S = TypeVar("S")  # the source: an encoded image
T = TypeVar("T")  # the payload: what decoding makes of it
R = TypeVar("R")  # the result of running it
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

SPEED_MARGIN = 2.0  # a deadline is refused if it would be missed on a machine this much faster than the measured one
RELEASES = 64  # how many are remembered


class Run(Protocol[T_contra, R_co]):
    """Returns a result for each payload, in order; `alone` in the scheduler, the batch may use every core."""

    def __call__(self, instance: int, payloads: Sequence[T_contra], *, alone: bool) -> Sequence[R_co]: ...  # noqa: D102


@dataclass(eq=False, slots=True)
class Release:
    """A batch that went to an instance, after its oldest image had waited `waited_seconds`.

    `run_seconds` is None while it runs, and covers the second runs of a batch that failed.
    """

    model: str
    reason: ReleaseReason
    size: int
    instance: int
    alone: bool
    waited_seconds: float
    started: float
    run_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class QueueActivity:
    """One lane in images, of which `admitted` counts also those that are about to enter or have just left.

    `virtual_seconds` is the instance time it has had, for fairness; `plan` is t(n) in seconds by batch size.
    """

    lane: str
    model: str
    to_decode: int
    decoding: int
    waiting: int
    running: int
    admitted: int
    capacity: int
    virtual_seconds: float
    plan: dict[int, float]


@dataclass(frozen=True, slots=True)
class Activity:
    """The scheduler at the time `now`: its queues, what each instance runs, and the last releases, newest first."""

    now: float
    queues: list[QueueActivity]
    instances: list[Release | None]
    releases: list[Release]


@dataclass(eq=False)
class Lane(Generic[S, T, R]):
    """One model's way through the scheduler: `decode` makes payloads of sources, `run` results of payloads.

    `capacity` bounds its images, from their admission to their result. `name` is unique; several lanes may share a
    `model`, which metrics go by.
    """

    name: str
    plan: BatchPlan
    decode: Callable[[S], T]
    run: Run[T, R]
    capacity: int
    model: str = ""
    # Mutable state: the plan; what waits to be decoded and what waits for an instance; how many images are admitted,
    # are being decoded, are in a batch; the batch size that ran out of memory, if one did.
    sources: Queue["Call[S, T, R]"] = field(default_factory=lambda: Queue(None))
    payloads: Queue["Call[S, T, R]"] = field(init=False)
    admitted: int = 0
    decoding: int = 0
    running: int = 0
    _too_large: int | None = None

    def __post_init__(self) -> None:
        self.model = self.model or self.name
        self.payloads = Queue(self.plan)

    def cap_batch_size(self, size: int) -> None:
        """Never again run `size` images at once."""
        self._too_large = size
        self.replan(self.plan)

    def replan(self, plan: BatchPlan) -> None:
        """Form batches by `plan` from now on, within the cap."""
        self.plan = self.payloads.plan = plan if self._too_large is None else plan.without(self._too_large)

    def seconds(self, images: int) -> float:
        """Seconds of one instance that so many images take."""
        return images * self.plan.image_seconds()

    def ahead(self) -> int:
        """Images that are admitted and in no batch yet."""
        return max(0, self.admitted - self.running)  # a caller that has gone frees its place before its batch ends

    def activity(self) -> QueueActivity:
        """The state of the lane."""
        return QueueActivity(
            lane=self.name,
            model=self.model,
            to_decode=len(self.sources.waiting),
            decoding=self.decoding,
            waiting=len(self.payloads.waiting),
            running=self.running,
            admitted=self.admitted,
            capacity=self.capacity,
            virtual_seconds=self.payloads.virtual_time,
            plan=dict(self.plan.seconds),
        )


@dataclass(eq=False, slots=True)
class Call(Item, Generic[S, T, R]):
    """One image on its way, which waits in the queues.

    As a job: call `lane.decode(source)`, then `Dispatcher.decoded`.
    """

    lane: Lane[S, T, R]
    source: S
    # Mutable state: how far it is, and what decoding made of it and took.
    stage: Literal["decode", "queue", "infer", "ended"] = "decode"
    payload: T | None = None
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Completed(Generic[R]):
    """A result, and the seconds until it was decoded, in the queue, and in its batch; that batch's size."""

    result: R
    decode_seconds: float
    queue_seconds: float
    run_seconds: float
    batch_size: int


Outcome = Completed[R] | Exception
Ended = list[tuple[Call[S, T, R], Outcome[R]]]


@dataclass(eq=False, slots=True)
class Running(Generic[S, T, R]):
    """A job: run `part` on `release.instance`, then call `Dispatcher.ran`; repeat until no part is left."""

    lane: Lane[S, T, R]
    release: Release
    # Mutable state: what is to run now, since when, and what is left of a batch that failed and was halved.
    part: list[Call[S, T, R]]
    started: float
    rest: deque[list[Call[S, T, R]]] = field(default_factory=deque)

    def payloads(self) -> list[T]:
        """What `lane.run` takes."""
        return [call.payload for call in self.part]  # type: ignore[misc]  # what runs has been decoded


Job = Call[S, T, R] | Running[S, T, R]


class Dispatcher(Generic[S, T, R]):
    """Returns the next job to a thread that asks: a batch where an instance is idle, else an image to decode."""

    def __init__(self, instances: int, decoders: int, metrics: EngineMetrics, max_delay_seconds: float = 0.0) -> None:
        self._instances = instances
        self._decoders = decoders
        self._metrics = metrics
        # Mutable state: the lanes, and whether new work is refused; what waits to be decoded and what waits for an
        # instance; the jobs under way, idle instances, the last releases; calls that ended since `take_ended`.
        self.lanes: list[Lane[S, T, R]] = []
        self.closed = False
        self._sources: Queues[Call[S, T, R]] = Queues()
        self._payloads: Queues[Call[S, T, R]] = Queues(max_delay_seconds)
        self._decoding: dict[Call[S, T, R], float] = {}  # since when
        self._running: dict[int, Running[S, T, R]] = {}
        self._idle = list(range(instances))
        self._releases: deque[Release] = deque(maxlen=RELEASES)
        self._ended: Ended[S, T, R] = []

    def __repr__(self) -> str:
        return (
            f"<Dispatcher to_decode={len(self._sources)} decoding={len(self._decoding)}/{self._decoders} "
            f"waiting={len(self._payloads)} busy={len(self._running)}/{self._instances}>"
        )

    def close(self) -> None:
        """Refuse new work, and delay no batch any longer."""
        self.closed = True
        self._payloads.max_delay_seconds = 0.0

    @property
    def admitted(self) -> int:
        """Images that have a place, in all lanes."""
        return sum(lane.admitted for lane in self.lanes)

    def admit(self, lane: Lane[S, T, R], count: int, now: float, deadline: float = inf) -> None:
        """Take `count` of the lane's places; `lane.admitted -= count` frees them.

        Raises:
            InvalidRequest, QueueFull: it never has that many, or has not that many left.
            DeadlineExceeded: what is admitted already keeps these images from being answered by `deadline`.
            ShuttingDown: new work is refused.
        """
        if self.closed:
            raise ShuttingDown("the service is shutting down and takes no new work; send the request again")
        if count > lane.capacity:
            raise InvalidRequest(f"{count} images in one request; PVT_QUEUE_SIZE allows {lane.capacity} at a time")
        if lane.admitted + count > lane.capacity:
            raise QueueFull(
                f"{lane.admitted} images wait for {lane.name!r} and PVT_QUEUE_SIZE allows {lane.capacity}; "
                f"{count} more do not fit now",
                retry_after_seconds=self.seconds_until_empty(lane),
            )
        least, left = self.least_seconds(lane, count), deadline - now
        if least > SPEED_MARGIN * left:
            for _ in range(count):
                self._metrics.cancelled("admission")
            raise DeadlineExceeded(
                f"{lane.ahead()} images wait for {lane.name!r} already: at the measured speed an answer is "
                f"{least:.3g} s away or more, and {max(0.0, left):.3g} s are left; "
                "allow more with timeout_ms, or send it again later"
            )
        lane.admitted += count

    def seconds_until_empty(self, lane: Lane[S, T, R]) -> float:
        """When all images of `lane` are likely to be answered, its instances shared fairly with other lanes."""
        own = lane.seconds(lane.admitted)
        # By the time that one lane has had its time, each other has had as much, or all of its work.
        others = (min(own, other.seconds(other.admitted)) for other in self.lanes if other is not lane)
        return (own + sum(others)) / self._instances

    def least_seconds(self, lane: Lane[S, T, R], count: int) -> float:
        """Before that, `count` more images of `lane` can't all be answered at the measured speed; 0 when all is idle.

        A lower bound: batches are full; the last image shares the last batch with as many as fit; each other instance
        may run a batch that outlasts it; decoding, and what other models get meanwhile, cost nothing.
        """
        if not self.admitted:
            return 0.0
        longest = max(each.plan.time(each.plan.largest) for each in self.lanes if each.admitted or each is lane)
        ahead = lane.seconds(max(0, lane.ahead() + count - lane.plan.largest))
        return max(0.0, ahead - (self._instances - 1) * longest) / self._instances + lane.plan.time(1)

    def add(self, call: Call[S, T, R], now: float, deadline: float = inf) -> None:
        """Queue `call` to be decoded."""
        call.arrived, call.deadline = now, deadline
        self._sources.add(call.lane.sources, call)

    def abandon(self, call: Call[S, T, R]) -> None:
        """The caller of `call` has gone: unless it has ended, nothing more is done for it."""
        if call.stage == "ended":
            return
        self._metrics.cancelled(call.stage)
        self._discard(call)
        call.stage = "ended"

    def has_work(self) -> bool:
        """Whether there is, or may soon be, a job that a thread could do now."""
        return (self._may_decode() and len(self._sources) > 0) or (bool(self._idle) and len(self._payloads) > 0)

    def next_job(self, now: float) -> Job[S, T, R] | float | None:
        """What to do now; or when to ask again, if a batch is delayed; or None, until something changes."""
        self._expire(now)
        decision = self._payloads.take(now, len(self._idle)) if self._idle else None
        if isinstance(decision, Batch):
            return self._start(decision, now)
        if self._may_decode() and isinstance(batch := self._sources.take(now, 1), Batch):
            (call,) = batch.items
            call.lane.decoding += 1
            self._decoding[call] = now
            return call
        return decision

    def decoded(self, call: Call[S, T, R], payload: T | Exception, now: float) -> None:
        """`call` is decoded: it waits for an instance from now on, or has ended with an error."""
        call.lane.decoding -= 1
        call.lane.sources.virtual_time += now - self._decoding.pop(call)
        if isinstance(payload, Exception):
            self._end(call, payload)
        elif call.stage != "ended":
            call.payload, call.stage = payload, "queue"
            call.decode_seconds, call.arrived = now - call.arrived, now
            self._payloads.add(call.lane.payloads, call)

    def ran(self, job: Running[S, T, R], results: Sequence[R] | Exception, now: float) -> None:
        """`job.part` is done. It becomes what to run next: half of what failed, or nothing, and the job is done."""
        part = job.part
        if not isinstance(results, Exception) and len(results) != len(part):
            results = RuntimeError(f"a batch of {len(part)} gave {len(results)} results")
        if not isinstance(results, Exception):
            for call, result in zip(part, results, strict=True):
                queue_seconds = job.started - call.arrived
                self._end(call, Completed(result, call.decode_seconds, queue_seconds, now - job.started, len(part)))
        elif len(part) == 1:
            self._end(part[0], results)
        else:
            if isinstance(results, OutOfMemory):
                job.lane.cap_batch_size(len(part))
            middle = len(part) // 2
            job.rest.extendleft((part[middle:], part[:middle]))
        job.part, job.started = [], now
        while job.rest and not job.part:
            job.part = [call for call in job.rest.popleft() if call.stage != "ended"]
        if not job.part:
            job.release.run_seconds = now - job.release.started
            job.lane.running -= job.release.size
            del self._running[job.release.instance]
            self._idle.append(job.release.instance)

    def end_all(self) -> None:
        """End every call with `ShuttingDown`."""
        calls = [call for lane in self.lanes for queue in (lane.sources, lane.payloads) for call in queue.waiting]
        calls += [call for job in self._running.values() for part in (job.part, *job.rest) for call in part]
        for call in [*calls, *self._decoding]:
            self._discard(call)
            self._end(call, ShuttingDown("the service stopped before this image was answered"))

    def take_ended(self) -> Ended[S, T, R]:
        """Calls that have ended since the last call of this, each once, and how."""
        ended, self._ended = self._ended, []
        return ended

    def stalled_seconds(self, now: float) -> dict[str, float]:
        """How long the longest-running job of each kind has been running; 0 when there is none."""
        started = {
            "decode": self._decoding.values(),
            "infer": [job.release.started for job in self._running.values()],
        }
        return {kind: now - min(times, default=now) for kind, times in started.items()}

    def activity(self, now: float) -> Activity:
        """All that can be seen."""
        instances = [job.release if (job := self._running.get(i)) else None for i in range(self._instances)]
        past = [replace(release) for release in reversed(self._releases)]
        return Activity(now, [lane.activity() for lane in self.lanes], instances, past)

    def _may_decode(self) -> bool:
        return len(self._decoding) < self._decoders

    def _expire(self, now: float) -> None:
        for queues in (self._sources, self._payloads):
            for _, call in queues.expire(now):
                self._metrics.cancelled(call.stage)
                self._end(call, DeadlineExceeded("the request's time ran out while the image waited"))

    def _discard(self, call: Call[S, T, R]) -> None:
        self._sources.discard(call.lane.sources, call)
        self._payloads.discard(call.lane.payloads, call)

    def _end(self, call: Call[S, T, R], outcome: Outcome[R]) -> None:
        if call.stage != "ended":
            call.stage = "ended"
            self._ended.append((call, outcome))

    def _start(self, batch: Batch[Call[S, T, R]], now: float) -> Running[S, T, R]:
        calls = list(batch.items)
        for call in calls:
            call.stage = "infer"
        lane, size = calls[0].lane, len(calls)
        others = self._decoding or self._running or len(self._sources) or len(self._payloads)
        alone = size == 1 and not others and self.admitted <= 1
        release = Release(lane.name, batch.reason, size, self._idle.pop(), alone, now - calls[0].arrived, started=now)
        job = Running(lane, release, calls, now)
        lane.running += size
        self._running[release.instance] = job
        self._releases.append(release)
        self._metrics.batch_released(lane.model, batch.reason, size)
        return job
