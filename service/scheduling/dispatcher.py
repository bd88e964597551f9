"""Who does what next: places, decoding, batches, instances, deadlines.

Synchronous, without a clock, thread or lock: `service.scheduling.scheduler` adds those. Times are seconds on the
caller's clock. What is admitted, and who is served next, goes by client.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Generic, TypeVar

from service.errors import DeadlineExceeded, InvalidRequest, OutOfMemory, QueueFull, ServiceError, ShuttingDown
from service.metrics import EngineMetrics
from service.scheduling.lanes import (
    FADE,
    LEAST_MEASURED,
    Activity,
    Call,
    Completed,
    Ended,
    Job,
    Lane,
    Outcome,
    Places,
    Release,
    Running,
    Speed,
)
from service.scheduling.queues import Batch, Queues, ReleaseReason

S = TypeVar("S")  # the source: an encoded image
T = TypeVar("T")  # the payload: what decoding makes of it
R = TypeVar("R")  # the result of running it

SPEED_MARGIN = 2.0  # a deadline is refused if it would be missed on a machine this much faster than the measured one
RELEASES = 64  # how many are remembered
LARGE_PLACES = 4  # large images have at most this part of a lane's places
HEADROOM = 0.75  # of the time left that the wait for an instance may take at the measured speed
_SMALL_SECONDS, _MEGAPIXEL_SECONDS = 0.0005, 0.005  # of decoding, before any was measured


class Dispatcher(Generic[S, T, R]):
    """Returns the next job to a thread that asks: a batch where an instance is idle, else an image to decode."""

    def __init__(self, instances: int, decoders: int, metrics: EngineMetrics, max_delay_seconds: float = 0.0) -> None:
        self._instances = instances
        self._decoders = decoders
        self._metrics = metrics
        # Large images leave threads to the others: half of them, or one more where there is only one.
        self._large_decoders = max(1, decoders // 2)
        # Mutable state: the lanes, and whether new work is refused; what waits to be decoded and what waits for an
        # instance; the jobs under way, idle instances, the last releases; calls that ended since `take_ended`; how fast
        # images are decoded, by the image and, large ones, by the megapixel; when a batch ended while others waited;
        # how many images have a place, in all lanes.
        self.lanes: list[Lane[S, T, R]] = []
        self.closed = False
        self._sources: Queues[Call[S, T, R]] = Queues()
        self._large: Queues[Call[S, T, R]] = Queues()
        self._payloads: Queues[Call[S, T, R]] = Queues(max_delay_seconds)
        self._decoding: dict[Call[S, T, R], float] = {}  # since when
        self._running: dict[int, Running[S, T, R]] = {}
        self._idle = list(range(instances))
        self._releases: deque[Release] = deque(maxlen=RELEASES)
        self._ended: Ended[S, T, R] = []
        self._large_decoding = 0
        self._small_speed, self._large_speed = Speed(), Speed()
        self._since: float | None = None
        self.admitted = 0

    def __repr__(self) -> str:
        return (
            f"<Dispatcher to_decode={len(self._sources) + len(self._large)} "
            f"decoding={len(self._decoding)}/{self._decoders} "
            f"waiting={len(self._payloads)} busy={len(self._running)}/{self._instances}>"
        )

    def close(self) -> None:
        """Refuse new work, and delay no batch any longer."""
        self.closed = True
        self._payloads.max_delay_seconds = 0.0

    def admit(  # noqa: PLR0917  as a request has them
        self, lane: Lane[S, T, R], count: int, now: float, deadline: float = inf, client: str = "", large: int = 0
    ) -> Places[S, T, R]:
        """Take `count` of the lane's places for `client`, `large` of them for large images; `release` frees them.

        1. Enough are free: they are taken.
        2. They would still be no more than the client's even share: those who hold most give theirs up, their newest
           images first, which end with `QueueFull`.
        3. Otherwise the request is refused.

        Raises:
            InvalidRequest, QueueFull: it never has that many, or has not that many left.
            DeadlineExceeded: what is admitted already keeps these images from being answered by `deadline`.
            ShuttingDown: new work is refused.
        """
        if self.closed:
            raise ShuttingDown("the service is shutting down and takes no new work; send the request again")
        if count > lane.capacity:
            raise InvalidRequest(f"{count} images in one request; PVT_QUEUE_SIZE allows {lane.capacity} at a time")
        self._check_room(lane, count, client, large)
        if late := self.lateness(lane, count, now, deadline, client):
            for _ in range(count):
                self._metrics.cancelled("admission")
            raise late
        if lane.admitted + count > lane.capacity:
            while lane.admitted + count > lane.capacity and self._push_out(lane, client):
                pass
            self._check_room(lane, count, client, large, pushed=True)
        lane.admitted += count
        self.admitted += count
        lane.large_admitted += large
        lane.held[client] = lane.held.get(client, 0) + count
        places = Places(lane, client, count, large, count)
        lane.requests[places] = None
        return places

    def release(self, places: Places[S, T, R], images: int | None = None, large: int = 0) -> None:
        """Free `images` of `places`, of which `large` are for large ones; all that are left if None."""
        if images is None:
            images, large = places.images, places.large
        lane, client = places.lane, places.client
        if images == places.images:
            lane.requests.pop(places, None)
        places.images -= images
        places.large -= large
        lane.admitted -= images
        self.admitted -= images
        lane.large_admitted -= large
        if left := lane.held.get(client, 0) - images:
            lane.held[client] = left
        else:
            lane.held.pop(client, None)

    def refusal(self, lane: Lane[S, T, R], now: float, deadline: float, client: str) -> ServiceError | None:
        """Why `admit` would refuse one small image more, if it would."""
        try:
            self._check_room(lane, 1, client, 0)
        except QueueFull as error:
            return error
        if late := self.lateness(lane, 1, now, deadline, client):
            self._metrics.cancelled("admission")
        return late

    def lateness(
        self, lane: Lane[S, T, R], count: int, now: float, deadline: float, client: str
    ) -> DeadlineExceeded | None:
        """Why `count` more images of `client` can't be answered by `deadline`, if that is so."""
        if deadline == inf or not self.admitted:
            return None
        left, ahead = deadline - now, lane.ahead()
        seconds = self.least_seconds(lane, count, ahead)
        if seconds > SPEED_MARGIN * left:
            ahead = lane.ahead_of(client, count)
            seconds = self.least_seconds(lane, count, ahead)
        if seconds <= SPEED_MARGIN * left:
            if not lane.flow_known(now) or lane.flow.of(lane.admitted) <= HEADROOM * left:
                return None
            ahead = lane.ahead_of(client, count)
            seconds = lane.flow.of(ahead) + lane.run_seconds(1)
            if lane.flow.of(ahead) <= HEADROOM * left:
                return None
        return DeadlineExceeded(
            f"{ahead} images wait for {lane.name!r} already: at the measured speed an answer is {seconds:.3g} s away "
            f"or more, and {max(0.0, left):.3g} s are left; allow more with timeout_ms, or send it again later"
        )

    def seconds_until_empty(self, lane: Lane[S, T, R]) -> float:
        """When all images of `lane` are likely to be answered, its instances shared fairly with other lanes.

        That takes as long as running, or decoding, what is admitted, whichever takes longer.
        """
        own = lane.seconds(lane.admitted)
        # By the time that one lane has had its time, each other has had as much, or all of its work.
        others = sum(min(own, other.seconds(other.admitted)) for other in self.lanes if other is not lane)
        measured = lane.flow.of(lane.admitted) if lane.flow.measured >= LEAST_MEASURED else 0.0
        return max((own + others) / self._instances, measured, self._decode_backlog())

    def _decode_backlog(self) -> float:
        """Seconds until all that waits now is decoded; large images on threads of their own."""
        large = sum(call.megapixels for lane in self.lanes for call in lane.large.waiting)
        large += sum(call.megapixels for call in self._decoding if call.large)
        small = len(self._sources) * self._small_speed.of(1.0)
        return max(self._large_speed.of(large) / self._large_decoders, small / self._decoders)

    def _check_room(self, lane: Lane[S, T, R], count: int, client: str, large: int, *, pushed: bool = False) -> None:
        """Raises QueueFull where places are missing and, unless others have been `pushed` out, can't be had."""
        most = lane.capacity // LARGE_PLACES
        if large and lane.large_admitted and lane.large_admitted + large > most:
            raise QueueFull(
                f"{lane.large_admitted} large images wait for {lane.name!r} and may take {most} places, a part of "
                f"PVT_QUEUE_SIZE; {large} more do not fit now",
                retry_after_seconds=self.seconds_until_empty(lane),
            )
        if lane.admitted + count > lane.capacity and (pushed or not self._has_claim(lane, count, client)):
            raise QueueFull(
                f"{lane.admitted} images wait for {lane.name!r} and PVT_QUEUE_SIZE allows {lane.capacity}; "
                f"{count} more do not fit now",
                retry_after_seconds=self.seconds_until_empty(lane),
            )

    def _has_claim(self, lane: Lane[S, T, R], count: int, client: str) -> bool:
        """Whether `client` would hold no more than an even share with `count` more places."""
        own = lane.held.get(client, 0)
        clients = len(lane.held) + (own == 0)
        return clients > 1 and (own + count) * clients <= lane.capacity

    def _push_out(self, lane: Lane[S, T, R], client: str) -> bool:
        """End the newest waiting image of the client that holds most places; False if there is none."""
        most, _ = max(lane.held.items(), key=lambda each: each[1])
        if most == client:
            return False
        queues = (lane.large, lane.sources, lane.payloads)
        call = next((call for queue in queues if (call := queue.newest(most))), None)
        if call is None or not isinstance(call.request, Places):
            return False
        self._discard(call)
        self.release(call.request, 1, int(call.large))
        self._metrics.cancelled("share")
        self._end(call, QueueFull(
            f"{lane.capacity} images wait for {lane.name!r}, as PVT_QUEUE_SIZE allows, and this client has most of "
            "them, so that this one made room for another client's",
            retry_after_seconds=self.seconds_until_empty(lane),
        ))  # fmt: skip
        return True

    def least_seconds(self, lane: Lane[S, T, R], count: int, ahead: int) -> float:
        """Before that, `count` more images of `lane` can't all be answered at the measured speed; 0 when all is idle.

        `ahead` images run before them. A lower bound: batches are full; the last image shares the last batch with as
        many as fit; each other instance may run a batch that outlasts it; decoding, and what other models get
        meanwhile, cost nothing.
        """
        if not self.admitted:
            return 0.0
        if ahead + count <= lane.plan.largest:  # the usual case, in which the rest comes to this
            return lane.plan.time(1)
        longest = max(each.plan.time(each.plan.largest) for each in self.lanes if each.admitted or each is lane)
        seconds = lane.seconds(max(0, ahead + count - lane.plan.largest))
        return max(0.0, seconds - (self._instances - 1) * longest) / self._instances + lane.plan.time(1)

    def add(
        self, call: Call[S, T, R], now: float, deadline: float = inf, places: Places[S, T, R] | None = None
    ) -> None:
        """Queue `call`, which has one of `places`, to be decoded."""
        call.arrived, call.deadline, call.latest = now, deadline, deadline
        if places:
            call.request, call.client = places, places.client
        if deadline < inf and self.admitted > 1:
            call.latest = deadline - self._decode_seconds(call) - call.lane.run_seconds(1)
        queues, queue = (self._large, call.lane.large) if call.large else (self._sources, call.lane.sources)
        queues.add(queue, call)

    def abandon(self, call: Call[S, T, R]) -> None:
        """The caller of `call` has gone: unless it has ended, nothing more is done for it."""
        if call.stage == "ended":
            return
        self._metrics.cancelled(call.stage)
        self._discard(call)
        self._leave_queue(call)
        call.stage = "ended"

    def has_work(self) -> bool:
        """Whether there is, or may soon be, a job that a thread could do now."""
        large = self._large and self._may_decode_large()
        small = self._sources and self._may_decode()
        return bool(large or small or (self._idle and self._payloads))

    def next_job(self, now: float) -> Job[S, T, R] | float | None:
        """What to do now; or when to ask again, if a batch is delayed; or None, until something changes."""
        self._expire(now)
        decision = None
        while self._idle and isinstance(decision := self._payloads.take(now, len(self._idle)), Batch):
            if calls := self._in_time(decision, now):
                return self._start(calls, decision.reason, now)
        if self._may_decode() and isinstance(batch := self._sources.take(now, 1), Batch):
            return self._start_decoding(batch, now)
        if self._may_decode_large() and isinstance(batch := self._large.take(now, 1), Batch):
            return self._start_decoding(batch, now)
        return None if isinstance(decision, Batch) else decision

    def decoded(self, call: Call[S, T, R], payload: T | Exception, now: float) -> None:
        """`call` is decoded: it waits for an instance from now on, or has ended with an error."""
        lane, seconds = call.lane, now - self._decoding.pop(call)
        lane.decoding -= 1
        self._large_decoding -= call.large
        (lane.large if call.large else lane.sources).charge(call.client, seconds - call.charged)
        if call.large:
            self._large_speed.add(seconds, call.megapixels)
        elif not lane.internal:
            self._small_speed.add(seconds, 1.0)
        if isinstance(payload, Exception):
            self._end(call, payload)
        elif call.stage != "ended":
            call.payload, call.stage = payload, "queue"
            call.wait_seconds, call.decode_seconds, call.arrived = now - seconds - call.arrived, seconds, now
            if call.latest < call.deadline:
                call.latest = call.deadline - lane.run_seconds(1)
            self._payloads.add(lane.payloads, call)

    def ran(self, job: Running[S, T, R], results: Sequence[R] | Exception, now: float) -> None:
        """`job.part` is done. It becomes what to run next: half of what failed, or nothing, and the job is done."""
        part = job.part
        if not isinstance(results, Exception) and len(results) != len(part):
            results = RuntimeError(f"a batch of {len(part)} gave {len(results)} results")
        if not isinstance(results, Exception):
            for call, result in zip(part, results, strict=True):
                seconds = call.wait_seconds, call.decode_seconds, job.started - call.arrived, now - job.started
                self._end(call, Completed(result, *seconds, len(part), job.release.reason, job.started))
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
            self._measure(job, now)
            job.release.run_seconds = now - job.release.started
            job.lane.running -= job.release.size
            del self._running[job.release.instance]
            self._idle.append(job.release.instance)

    def end_all(self) -> None:
        """End every call with `ShuttingDown`."""
        calls = [call for lane in self.lanes for queue in (lane.sources, lane.large, lane.payloads)
                 for call in queue.waiting]  # fmt: skip
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
        return Activity(now, [lane.activity() for lane in self.lanes if not lane.internal], instances, past)

    def _may_decode(self) -> bool:
        return len(self._decoding) - self._large_decoding < max(1, self._decoders - self._large_decoding)

    def _may_decode_large(self) -> bool:
        return self._large_decoding < self._large_decoders and (
            len(self._decoding) < self._decoders or self._decoders == 1
        )

    def _decode_seconds(self, call: Call[S, T, R]) -> float:
        """What decoding `call` is likely to take."""
        if call.large:
            return self._large_speed.of(call.megapixels) or call.megapixels * _MEGAPIXEL_SECONDS
        return self._small_speed.of(1.0) or _SMALL_SECONDS

    def _start_decoding(self, batch: Batch[Call[S, T, R]], now: float) -> Call[S, T, R]:
        (call,) = batch.items
        call.charged = self._decode_seconds(call)
        batch.queue.charge(call.client, call.charged)
        call.lane.decoding += 1
        self._large_decoding += call.large
        self._decoding[call] = now
        return call

    def _in_time(self, batch: Batch[Call[S, T, R]], now: float) -> list[Call[S, T, R]]:
        """Those of `batch` that can end in time; the others end now. What is alone is always tried."""
        calls = list(batch.items)
        end = now + calls[0].lane.run_seconds(len(calls))
        late = [call for call in calls if call.deadline < end] if self.admitted > 1 else []
        for call in late:
            self._end_late(call)
        return [call for call in calls if call.stage != "ended"] if late else calls

    def _measure(self, job: Running[S, T, R], now: float) -> None:
        """How long `job` took beside its plan; and, if images waited ever since another ended, how fast they flow."""
        size, lane = job.release.size, job.lane
        lane.pace.add(now - job.release.started, lane.plan.time(min(size, lane.plan.largest)))
        if self._since is not None:
            lane.flow.add(now - self._since, size)
            lane.flow_at = now
        waits = self._payloads or self._sources
        self._since = now if waits else None

    def _expire(self, now: float) -> None:
        for queues in (self._sources, self._large, self._payloads):
            if queues.all_in_time <= now:
                for _, call in queues.expire(now):
                    self._end_late(call)

    def _end_late(self, call: Call[S, T, R]) -> None:
        self._metrics.cancelled(call.stage)
        for speed in (call.lane.pace, self._large_speed if call.large else self._small_speed):
            speed.doubt(FADE)
        self._end(call, DeadlineExceeded("the request's time ran out while the image waited"))

    def _discard(self, call: Call[S, T, R]) -> None:
        lane = call.lane
        for queues, queue in (
            (self._sources, lane.sources), (self._large, lane.large), (self._payloads, lane.payloads)
        ):  # fmt: skip
            if queues.discard(queue, call):
                return

    @staticmethod
    def _leave_queue(call: Call[S, T, R]) -> None:
        if call.stage in {"decode", "queue"} and isinstance(call.request, Places):
            call.request.waiting -= 1

    def _end(self, call: Call[S, T, R], outcome: Outcome[R]) -> None:
        if call.stage != "ended":
            self._leave_queue(call)
            call.stage = "ended"
            self._ended.append((call, outcome))

    def _start(self, calls: list[Call[S, T, R]], reason: ReleaseReason, now: float) -> Running[S, T, R]:
        for call in calls:
            self._leave_queue(call)
            call.stage = "infer"
        lane, size = calls[0].lane, len(calls)
        others = self._decoding or self._running or self._sources or self._large or self._payloads
        alone = size == 1 and not others and self.admitted <= 1
        release = Release(lane.name, reason, size, self._idle.pop(), alone, now - calls[0].arrived, started=now)
        job = Running(lane, release, calls, now)
        lane.running += size
        self._running[release.instance] = job
        if not lane.internal:
            self._releases.append(release)
            self._metrics.batch_released(lane.model, reason, size)
        return job
