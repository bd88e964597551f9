"""The dispatcher at work: a lock, threads that ask it for their next job, and futures for the callers.

A thread finds its next job without a turn of the event loop, so that no instance is idle while the loop comes round.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from threading import Condition, Thread, get_ident
from time import monotonic
from typing import Generic, ParamSpec, TypeVar

from service.errors import ServiceError
from service.execution.plan import BatchPlan
from service.metrics import EngineMetrics
from service.scheduling.dispatcher import Dispatcher
from service.scheduling.lanes import Activity, Call, Completed, Ended, Job, Lane, Places

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
J = TypeVar("J")
O = TypeVar("O")  # noqa: E741


LITTLE_WAITS = 16  # images; with fewer, a refusal that comes after the body was read costs nobody much


class Scheduler(Generic[S, T, R]):
    """Gives work to idle instances as soon as there is some, and lets batches grow only while all are busy.

    It lives until it is closed. Its methods belong to one event loop.
    """

    def __init__(
        self, instances: int, metrics: EngineMetrics, *, decoders: int = 1, max_delay_seconds: float = 0.0
    ) -> None:
        """`decoders`: how many images are decoded at the same time."""
        # Of threads, so that decoding goes on beside running, and of small images beside that of a large one.
        self._count = instances + max(2, decoders)
        # Mutable state. Used under `_changed` only: the dispatcher; whether the threads are to end; the lane whose job
        # each thread has, until it asks for the next; what to call once no thread has a job of a closed lane. Used by
        # the event loop only: the threads, and the futures of callers.
        self._dispatcher = Dispatcher[S, T, R](instances, decoders, metrics, max_delay_seconds)
        self._changed = Condition()
        self._stopped = False
        self._at: dict[int, Lane[S, T, R]] = {}
        self._closing: dict[Lane[S, T, R], Callable[[], object]] = {}
        self._threads: list[Thread] = []
        self._futures: dict[Call[S, T, R], asyncio.Future[Completed[R]]] = {}

    def __repr__(self) -> str:
        return f"<Scheduler {self._dispatcher!r}>"

    async def close(self, *, wait: bool = True) -> None:
        """Refuse new work and finish what is queued; without `wait`, end that with `ShuttingDown`."""
        with self._changed:
            self._dispatcher.close()
            self._stopped = not wait
            if not wait:
                self._dispatcher.end_all()
            ended = self._dispatcher.take_ended()
            self._changed.notify_all()
        self._settle(ended)
        while self._futures:
            await asyncio.wait(self._futures.values())
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if wait:
            for thread in self._threads:
                await asyncio.to_thread(thread.join)

    def open_lane(self, lane: Lane[S, T, R]) -> Lane[S, T, R]:
        """Take calls for `lane`. Its `decode` and `run` run on threads, `run` once at a time per instance."""
        with self._changed:
            self._dispatcher.lanes.append(lane)
        return lane

    def replan(self, lane: Lane[S, T, R], plan: BatchPlan) -> None:
        """Form the batches of `lane` by `plan` from now on."""
        with self._changed:
            lane.replan(plan)

    async def close_lane(self, lane: Lane[S, T, R]) -> None:
        """Remove `lane`, which holds no places; returns once no thread uses its `decode` and `run`."""
        loop, unused = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            if lane.admitted:
                raise RuntimeError(f"the lane of {lane.name!r} still holds {lane.admitted} images")
            self._dispatcher.lanes.remove(lane)
            if lane not in self._at.values():
                return
            self._closing[lane] = partial(loop.call_soon_threadsafe, unused.set)
        await unused.wait()

    @contextmanager
    def reserve(
        self, lane: Lane[S, T, R], count: int, deadline: float = inf, client: str = "", large: int = 0
    ) -> Iterator[Places[S, T, R]]:
        """Hold `count` of the lane's places for `client` while the context lasts, `large` of them for large images.

        `deadline` is on `time.monotonic`.

        Raises:
            InvalidRequest, QueueFull, DeadlineExceeded, ShuttingDown: see `Dispatcher.admit`.
        """
        with self._changed:
            places = self._dispatcher.admit(lane, count, monotonic(), deadline, client, large)
        try:
            yield places
        finally:
            with self._changed:
                self._dispatcher.release(places)

    def refusal(self, lane: Lane[S, T, R], deadline: float = inf, client: str = "") -> ServiceError | None:
        """What `reserve` would raise for one small image of `client`, if it would; None too where little waits."""
        if lane.admitted < min(lane.capacity, LITTLE_WAITS):  # not worth the lock
            return None
        with self._changed:
            return self._dispatcher.refusal(lane, monotonic(), deadline, client)

    def waiting(self, lane: Lane[S, T, R], client: str) -> int:
        """Images of `client` in `lane` that are in no batch yet."""
        with self._changed:
            return sum(places.waiting for places in lane.requests if places.client == client)

    async def submit(
        self, places: Places[S, T, R], source: S, deadline: float = inf, megapixels: float = 0.0
    ) -> Completed[R]:
        """Decode `source`, for which one of `places` is, and run it in some batch. `deadline` is on `time.monotonic`.

        Raises:
            QueueFull: another client, which had less, has got its place.
            DeadlineExceeded: it still waited when `deadline` passed.
            Exception: what decoding it, or running it alone, raised.
        """
        call, loop = Call(places.lane, source, megapixels), asyncio.get_running_loop()
        future: asyncio.Future[Completed[R]] = loop.create_future()
        self._futures[call] = future
        if not self._threads:
            # Daemons: a run that never ends, and was given up, does not keep the process.
            self._threads = [
                Thread(target=self._work, args=(loop,), name=f"pvt-work-{i}", daemon=True) for i in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
        with self._changed:
            self._dispatcher.add(call, monotonic(), deadline, places)
            self._changed.notify()
        try:
            return await future
        finally:
            del self._futures[call], future  # an error refers to this frame, and must not do so through the future
            if call.stage != "ended":  # the usual case, in which no lock is needed
                with self._changed:
                    self._dispatcher.abandon(call)

    @property
    def idle(self) -> bool:
        """Whether no image is on its way."""
        return not self._dispatcher.admitted

    def activity(self) -> Activity:
        """Queues, instances and the last releases."""
        with self._changed:
            return self._dispatcher.activity(monotonic())

    def stalled_seconds(self) -> dict[str, float]:
        """How long the longest-running job of each kind has been running; 0 when there is none."""
        with self._changed:
            return self._dispatcher.stalled_seconds(monotonic())

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """The life of a thread."""
        with suppress(RuntimeError):  # the loop was closed while a job that was given up ran
            while self._do_next(loop):
                pass

    def _do_next(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Wait for a job and do it; False when there will be none."""
        # An error's traceback leads to this frame, which must not lead back to the error: no variable has an outcome.
        job, finish = self._next(loop), partial(self._finish, loop)
        if isinstance(job, Call):
            finish(self._dispatcher.decoded, job, _attempt(job.lane.decode, job.source))
        elif job:
            while job.part:
                run, (instance, alone) = job.lane.run, (job.release.instance, job.release.alone)
                finish(self._dispatcher.ran, job, _attempt(run, instance, job.payloads(), alone=alone))
        return job is not None

    def _finish(
        self, loop: asyncio.AbstractEventLoop, finish: Callable[[J, O, float], object], job: J, outcome: O
    ) -> None:
        with self._changed:
            finish(job, outcome, monotonic())
            ended = self._dispatcher.take_ended()
        self._hand_over(loop, ended)

    def _next(self, loop: asyncio.AbstractEventLoop) -> Job[S, T, R] | None:
        with self._changed:
            self._leave_lane()
            while not self._stopped:
                now = monotonic()
                decision = self._dispatcher.next_job(now)
                self._hand_over(loop, self._dispatcher.take_ended())
                if decision is not None and not isinstance(decision, float):
                    self._at[get_ident()] = decision.lane
                    if self._dispatcher.has_work():
                        self._changed.notify()  # one wakes the next, for as long as there is something to do
                    return decision
                self._changed.wait(None if decision is None else decision - now)
        return None

    def _leave_lane(self) -> None:
        """This thread holds nothing of its last job any more, which may be what the closing of its lane waits for."""
        lane = self._at.pop(get_ident(), None)
        if lane and lane not in self._at.values() and (unused := self._closing.pop(lane, None)):
            del lane  # whoever waits may free the model at once
            unused()

    def _hand_over(self, loop: asyncio.AbstractEventLoop, ended: Ended[S, T, R]) -> None:
        """All that ended at once, in one turn of the loop."""
        if ended:
            loop.call_soon_threadsafe(self._settle, ended)

    def _settle(self, ended: Ended[S, T, R]) -> None:
        for call, outcome in ended:
            future = self._futures.get(call)
            if future is None or future.done():  # its caller has gone
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


def _attempt(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | Exception:
    """What `function` returns or raises; whatever it raises belongs to its callers, and the thread lives on."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        return error
    except BaseException as error:  # noqa: BLE001  extensions raise such, and asyncio would end the loop with it
        return RuntimeError(f"{type(error).__name__}: {error}")
