"""Who does what next: places, decoding, batches, instances, deadlines.

Synchronous, with neither clock nor thread nor lock of its own: `service.scheduling.scheduler` gives it those, tests
drive it step by step. Times are seconds on the caller's clock.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Generic, Protocol, TypeVar

from service.errors import DeadlineExceeded, OutOfMemory, ShuttingDown
from service.scheduling.activity import RELEASES, Activity, InstanceActivity, PastRelease, QueueActivity, Release, Stats
from service.scheduling.admission import Admission
from service.scheduling.lanes import Call, Completed, Decoding, Lane, Outcome, Running
from service.scheduling.queues import Batch, Item, Queues

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class Observer(Protocol):
    """Told of what happens; `service.metrics` is one."""

    def batch_released(self, model: str, reason: str, size: int) -> None: ...  # noqa: D102
    def cancelled(self, stage: str) -> None: ...  # noqa: D102


class Dispatcher(Generic[S, T, R]):
    """Gives whoever asks the next job: a batch where an instance is idle, else a picture to decode."""

    def __init__(self, instances: int, decoders: int, observer: Observer, max_delay_seconds: float = 0.0) -> None:
        self._instances = instances
        self._decoders = decoders
        self._observer = observer
        # Mutable state: the places, what waits to be decoded and what waits for an instance, the jobs under way, idle
        # instances, the last releases, calls that ended and whose `end` has not been called.
        self.places = Admission(instances)
        self._sources: Queues[Call[S, T, R]] = Queues()
        self._payloads: Queues[Call[S, T, R]] = Queues(max_delay_seconds)
        self._decoding: set[Decoding[S, T, R]] = set()
        self._running: dict[int, Running[S, T, R]] = {}
        self._idle = list(range(instances))
        self._releases: deque[Release] = deque(maxlen=RELEASES)
        self._ended: list[tuple[Call[S, T, R], Outcome[R]]] = []

    def __repr__(self) -> str:
        return (
            f"<Dispatcher to_decode={len(self._sources)} decoding={len(self._decoding)}/{self._decoders} "
            f"waiting={len(self._payloads)} busy={len(self._running)}/{self._instances}>"
        )

    def close(self) -> None:
        """Refuse what comes, and hold no batch back any longer."""
        self.places.closed = True
        self._payloads.max_delay_seconds = 0.0

    def add(self, call: Call[S, T, R], now: float, deadline: float = inf) -> None:
        """Queue `call` to be decoded."""
        call.item = Item(call, now, deadline)
        self._sources.add(call.lane.sources, call.item)

    def abandon(self, call: Call[S, T, R]) -> None:
        """The caller of `call` has gone: unless it has ended, nothing more is done for it."""
        if call.stage == "ended":
            return
        self._observer.cancelled(call.stage)
        self._discard(call)
        call.stage = "ended"

    def has_work(self) -> bool:
        """Whether there is, or may soon be, a job that somebody could do now."""
        return (self._may_decode() and len(self._sources) > 0) or (bool(self._idle) and len(self._payloads) > 0)

    def next_job(self, now: float) -> Decoding[S, T, R] | Running[S, T, R] | float | None:
        """What to do now; or when to ask again, if a batch is being held back; or nothing, until something changes."""
        self._expire(now)
        decision = self._payloads.take(now, len(self._idle)) if self._idle else None
        if isinstance(decision, Batch):
            return self._start(decision, now)
        if self._may_decode() and isinstance(batch := self._sources.take(now, 1), Batch):
            (item,) = batch.items
            job = Decoding(item.payload, now)
            job.call.lane.decoding += 1
            self._decoding.add(job)
            return job
        return decision

    def decoded(self, job: Decoding[S, T, R], payload: T | Exception, now: float) -> None:
        """`job` is done."""
        call = job.call
        self._decoding.remove(job)
        call.lane.decoding -= 1
        call.lane.sources.virtual_time += now - job.started
        if call.stage == "ended":
            return
        if isinstance(payload, Exception):
            self._end(call, payload)
            return
        assert call.item is not None  # noqa: S101  it was added
        call.payload, call.stage = payload, "queue"
        call.decode_seconds = now - call.item.arrived
        call.item = Item(call, now, call.item.deadline)
        self._payloads.add(call.lane.payloads, call.item)

    def ran(self, job: Running[S, T, R], results: Sequence[R] | Exception, now: float) -> None:
        """`job.part` is done. It becomes what to run next: a half of what failed, or nothing, and the job is done."""
        if not isinstance(results, Exception) and len(results) != len(job.part):
            results = RuntimeError(f"a batch of {len(job.part)} gave {len(results)} results")
        if not isinstance(results, Exception):
            for call, result in zip(job.part, results, strict=True):
                assert call.item is not None  # noqa: S101  it was added
                queue_seconds = job.started - call.item.arrived
                size = len(job.part)
                self._end(call, Completed(result, call.decode_seconds, queue_seconds, now - job.started, size))
        elif len(job.part) == 1:
            self._end(job.part[0], results)
        else:
            if isinstance(results, OutOfMemory):
                job.lane.give_up(len(job.part))
            middle = len(job.part) // 2
            job.rest.extendleft((job.part[middle:], job.part[:middle]))
        self._next_part(job, now)

    def give_up(self) -> None:
        """End every call that is there with `ShuttingDown`."""
        there = [
            item.payload for lane in self.places.lanes for q in (lane.sources, lane.payloads) for item in q.waiting
        ]
        there += [job.call for job in self._decoding]
        there += [call for job in self._running.values() for part in (job.part, *job.rest) for call in part]
        for call in there:
            self._discard(call)
            self._end(call, ShuttingDown("the service stopped before this image was answered"))

    def take_ended(self) -> list[tuple[Call[S, T, R], Outcome[R]]]:
        """Calls that have ended since this was last asked, each once, to have their `end` called."""
        ended, self._ended = self._ended, []
        return ended

    def stalled_seconds(self, now: float) -> dict[str, float]:
        """How long the job of each kind that has run longest has been running; 0 when there is none."""
        started = {
            "decode": [job.started for job in self._decoding],
            "infer": [job.release.started for job in self._running.values()],
        }
        return {kind: now - min(times, default=now) for kind, times in started.items()}

    def stats(self) -> Stats:
        """How much waits for each model and how many instances run."""
        waiting: Counter[str] = Counter()
        for lane in self.places.lanes:
            waiting[lane.model] += len(lane.payloads.waiting)
        return Stats(waiting, len(self._running), self._instances)

    def activity(self, now: float) -> Activity:
        """All there is to see."""
        queues = [_queue(lane) for lane in self.places.lanes]
        instances = [
            InstanceActivity(i, job.release, now - job.release.started)
            if (job := self._running.get(i))
            else InstanceActivity(i)
            for i in range(self._instances)
        ]
        releases = [PastRelease(replace(release), now - release.started) for release in reversed(self._releases)]
        return Activity(queues, instances, releases)

    def _may_decode(self) -> bool:
        return len(self._decoding) < self._decoders

    def _expire(self, now: float) -> None:
        for queues in (self._sources, self._payloads):
            for _, item in queues.expire(now):
                self._observer.cancelled(item.payload.stage)
                self._end(item.payload, DeadlineExceeded("the request's time ran out while the image waited"))

    def _discard(self, call: Call[S, T, R]) -> None:
        if call.item:
            self._sources.discard(call.lane.sources, call.item)
            self._payloads.discard(call.lane.payloads, call.item)

    def _end(self, call: Call[S, T, R], outcome: Outcome[R]) -> None:
        if call.stage != "ended":
            call.stage = "ended"
            self._ended.append((call, outcome))

    def _start(self, batch: Batch[Call[S, T, R]], now: float) -> Running[S, T, R]:
        calls = [item.payload for item in batch.items]
        for call in calls:
            call.stage = "infer"
        lane, size = calls[0].lane, len(calls)
        others = self._decoding or self._running or len(self._sources) or len(self._payloads)
        alone = size == 1 and not others and self.places.admitted <= 1
        release = Release(
            lane.name, batch.reason, size, self._idle.pop(), alone, now - batch.items[0].arrived, started=now
        )
        job = Running(lane, release, calls, now)
        lane.running += size
        self._running[release.instance] = job
        self._releases.append(release)
        self._observer.batch_released(lane.model, batch.reason, size)
        return job

    def _next_part(self, job: Running[S, T, R], now: float) -> None:
        job.part, job.started = [], now
        while job.rest and not job.part:
            job.part = [call for call in job.rest.popleft() if call.stage != "ended"]
        if job.part:
            return
        job.release.run_seconds = now - job.release.started
        job.lane.running -= job.release.size
        del self._running[job.release.instance]
        self._idle.append(job.release.instance)


def _queue(lane: Lane[S, T, R]) -> QueueActivity:
    return QueueActivity(
        model=lane.name,
        to_decode=len(lane.sources.waiting),
        decoding=lane.decoding,
        waiting=len(lane.payloads.waiting),
        running=lane.running,
        admitted=lane.admitted,
        capacity=lane.capacity,
        virtual_seconds=lane.payloads.virtual_time,
        plan={n: lane.plan.time(n) for n in lane.plan.sizes},
    )
