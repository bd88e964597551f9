"""The async shell of the queues: futures, instances, deadlines, cancellation. Knows neither tensors nor threads."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Generic, Protocol, TypeVar

from service.errors import DeadlineExceeded, InvalidRequest, OutOfMemory, QueueFull, ShuttingDown
from service.plan import BatchPlan
from service.queues import Batch, Item, Queue, Queues

T = TypeVar("T")
R = TypeVar("R")

# Runs one batch on the numbered instance; gives as many results as it got payloads, in their order.
Run = Callable[[int, Sequence[T]], Awaitable[Sequence[R]]]


@dataclass(frozen=True, slots=True)
class Completed(Generic[R]):
    """A result and what it took: seconds in the queue, seconds in the batch that gave the result, that batch's size."""

    result: R
    queue_seconds: float
    run_seconds: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Stats:
    """One look at the scheduler; metrics and health share it."""

    waiting: dict[str, int]
    busy_instances: int
    instances: int


class Observer(Protocol):
    """Told of what happens; `service.metrics` is one."""

    def batch_released(self, model: str, reason: str, size: int) -> None: ...  # noqa: D102
    def cancelled(self, stage: str) -> None: ...  # noqa: D102


@dataclass(eq=False, slots=True)
class _Call(Generic[T, R]):
    payload: T
    future: asyncio.Future[Completed[R]]


class Lane(Generic[T, R]):
    """One model's way into the scheduler. `capacity` bounds the images it may hold, waiting and running."""

    def __init__(self, queue: Queue[_Call[T, R]], run: Run[T, R], capacity: int) -> None:
        self.queue = queue
        self.run = run
        self.capacity = capacity
        # Mutable state: images admitted and not yet answered.
        self.admitted = 0


class Scheduler(Generic[T, R]):
    """Gives idle instances work as soon as there is some, and lets batches grow only while all are busy.

    It lives until it is closed.
    """

    def __init__(self, instances: int, observer: Observer, *, max_delay_seconds: float = 0.0) -> None:
        self._instances = instances
        self._observer = observer
        # Mutable state: what waits, which instances are idle, the batches that run, the timer of a batch that is being
        # held back, and whether new work is refused.
        self._queues: Queues[_Call[T, R]] = Queues(max_delay_seconds)
        self._lanes: dict[Queue[_Call[T, R]], Lane[T, R]] = {}
        self._idle = list(range(instances))
        self._running: set[asyncio.Task[None]] = set()
        self._wakeup: asyncio.TimerHandle | None = None
        self._closed = False

    def __repr__(self) -> str:
        busy = self._instances - len(self._idle)
        return f"<Scheduler waiting={len(self._queues)} busy={busy}/{self._instances}>"

    async def close(self, *, wait: bool = True) -> None:
        """Refuse what comes and answer what is there; without `wait`, end that with `ShuttingDown`."""
        self._closed = True
        self._queues.max_delay_seconds = 0.0
        self._dispatch()
        while self._running:
            for task in () if wait else self._running:
                task.cancel()
            await asyncio.wait(self._running)

    def open_lane(self, name: str, plan: BatchPlan, run: Run[T, R], capacity: int) -> Lane[T, R]:
        """A queue for the model `name`, whose batches `run` executes."""
        lane = Lane[T, R](Queue(name, plan), run, capacity)
        self._lanes[lane.queue] = lane
        return lane

    def stats(self) -> Stats:
        """How much waits for each model and how many instances run."""
        waiting = {queue.name: len(queue.waiting) for queue in self._lanes}
        return Stats(waiting, self._instances - len(self._idle), self._instances)

    @contextmanager
    def places(self, lane: Lane[T, R], count: int) -> Iterator[None]:
        """Hold `count` of the lane's places while the context lasts.

        Raises:
            InvalidRequest: it never has that many.
            QueueFull: it has not that many left.
            ShuttingDown: the scheduler is closed.
        """
        if self._closed:
            raise ShuttingDown("the service is shutting down and takes no new work; send the request again")
        if count > lane.capacity:
            raise InvalidRequest(f"{count} images in one request; PVT_QUEUE_SIZE allows {lane.capacity} at a time")
        if lane.admitted + count > lane.capacity:
            raise QueueFull(
                f"{lane.admitted} images wait for {lane.queue.name!r} and PVT_QUEUE_SIZE allows {lane.capacity}; "
                f"{count} more do not fit now",
                retry_after_seconds=lane.admitted * lane.queue.plan.image_seconds() / self._instances,
            )
        lane.admitted += count
        try:
            yield
        finally:
            lane.admitted -= count

    async def submit(self, lane: Lane[T, R], payload: T, deadline: float = inf) -> Completed[R]:
        """Run `payload` in some batch of `lane`. `deadline` is on `time.monotonic`.

        Raises:
            DeadlineExceeded: it still waited when `deadline` passed.
            Exception: what running it alone raised.
        """
        loop = asyncio.get_running_loop()
        item = Item(_Call[T, R](payload, loop.create_future()), monotonic(), deadline)
        self._queues.add(lane.queue, item)
        self._dispatch()
        try:
            return await item.payload.future
        finally:
            if self._queues.discard(lane.queue, item):
                self._observer.cancelled("queue")

    def _dispatch(self) -> None:
        """Give every idle instance what is due, and set the timer for what is not yet."""
        now = monotonic()
        for _, item in self._queues.expire(now):
            _fail(item.payload.future, DeadlineExceeded("the request's time ran out while the image waited"))
        while self._idle:
            decision = self._queues.take(now, len(self._idle))
            if isinstance(decision, Batch):
                self._start(decision)
                continue
            if self._wakeup:
                self._wakeup.cancel()
            self._wakeup = None
            if decision is not None:
                self._wakeup = asyncio.get_running_loop().call_later(decision - now, self._dispatch)
            return

    def _start(self, batch: Batch[_Call[T, R]]) -> None:
        self._observer.batch_released(batch.queue.name, batch.reason, len(batch.items))
        task = asyncio.create_task(self._execute(batch, self._idle.pop()))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _execute(self, batch: Batch[_Call[T, R]], instance: int) -> None:
        try:
            await self._settle(self._lanes[batch.queue], batch.items, instance)
        finally:
            for item in batch.items:  # only a task that was itself cancelled leaves one
                _fail(item.payload.future, ShuttingDown("the service stopped before this image was answered"))
            self._idle.append(instance)
            self._dispatch()

    async def _settle(self, lane: Lane[T, R], items: Sequence[Item[_Call[T, R]]], instance: int) -> None:
        """Answer `items`; when their batch fails, halve it until only those that fail alone are left."""
        alive = [item for item in items if not item.payload.future.done()]
        if not alive:
            return
        start = monotonic()
        try:
            results = await lane.run(instance, [item.payload.payload for item in alive])
            if len(results) != len(alive):
                raise RuntimeError(f"a batch of {len(alive)} gave {len(results)} results")  # noqa: TRY301
        except Exception as error:  # noqa: BLE001  whatever a batch raises belongs to its callers
            await self._bisect(lane, alive, instance, error)
            return
        seconds = monotonic() - start
        for item, result in zip(alive, results, strict=True):
            if not item.payload.future.done():
                item.payload.future.set_result(Completed(result, start - item.arrived, seconds, len(alive)))

    async def _bisect(
        self, lane: Lane[T, R], items: Sequence[Item[_Call[T, R]]], instance: int, error: Exception
    ) -> None:
        if len(items) == 1:
            _fail(items[0].payload.future, error)
            return
        if isinstance(error, OutOfMemory):
            lane.queue.plan = lane.queue.plan.without(len(items))
        middle = len(items) // 2
        await self._settle(lane, items[:middle], instance)
        await self._settle(lane, items[middle:], instance)


def _fail(future: asyncio.Future[Completed[R]], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
