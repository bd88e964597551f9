"""What waits, and which of it is next. Pure decisions: no clock, no task, no thread of its own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Generic, Literal, Protocol, TypeVar

T = TypeVar("T")

ReleaseReason = Literal["idle", "full", "delay"]


@dataclass(eq=False, slots=True)
class Item(Generic[T]):
    """One image on its way through a queue. Times are seconds on the caller's clock."""

    payload: T
    arrived: float
    deadline: float = inf


class Sizes(Protocol):
    """What a queue asks of its batch plan; `service.execution.plan.BatchPlan` is one."""

    @property
    def largest(self) -> int: ...  # noqa: D102
    def time(self, n: int) -> float: ...  # noqa: D102
    def best(self, waiting: int) -> int: ...  # noqa: D102


@dataclass(eq=False, slots=True)
class Queue(Generic[T]):
    """The queue of one model.

    `plan` rules its batches; `virtual_time` is the share of the instances it has had, in seconds, for fairness.
    """

    name: str
    plan: Sizes
    virtual_time: float = 0.0
    waiting: dict[Item[T], None] = field(default_factory=dict)  # a dict for removal in O(1) that keeps the order

    def oldest(self) -> Item[T]:
        """The item that has waited longest."""
        return next(iter(self.waiting))


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Items of one queue that run together, and why they were released now."""

    queue: Queue[T]
    items: tuple[Item[T], ...]
    reason: ReleaseReason


class Queues(Generic[T]):
    """The queues of all models in front of instances that they share."""

    def __init__(self, max_delay_seconds: float = 0.0) -> None:
        """`max_delay_seconds`: how long a batch that is not full may be held back while an instance is idle."""
        self.max_delay_seconds = max_delay_seconds
        # Mutable state: the queues that have something waiting, and the virtual time of the last one served.
        self._active: dict[Queue[T], None] = {}
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return sum(len(queue.waiting) for queue in self._active)

    def add(self, queue: Queue[T], item: Item[T]) -> None:
        """Put `item` at the end of `queue`."""
        if not queue.waiting:
            # A queue that was empty has saved nothing up: it joins at the present virtual time.
            queue.virtual_time = max(queue.virtual_time, self._virtual_time)
            self._active[queue] = None
        queue.waiting[item] = None

    def discard(self, queue: Queue[T], item: Item[T]) -> bool:
        """Take `item` out; False if it was not waiting any more."""
        if item not in queue.waiting:
            return False
        del queue.waiting[item]
        if not queue.waiting:
            del self._active[queue]
        return True

    def expire(self, now: float) -> Iterator[tuple[Queue[T], Item[T]]]:
        """Take out, and yield, every item whose deadline has passed."""
        expired = [(queue, item) for queue in self._active for item in queue.waiting if item.deadline <= now]
        for queue, item in expired:
            self.discard(queue, item)
            yield queue, item

    def take(self, now: float, idle: int) -> Batch[T] | float | None:
        """What one of `idle` free instances does now.

        1. Nothing waits: None.
        2. Something is due: the batch of the queue that has had the least of the instances so far. Among equals the
           oldest item decides.
        3. Batches are being held back by the delay: the time at which the first of them is due.
        """
        if not self._active:
            return None
        due = {queue: reason for queue in self._active if (reason := self._due(queue, now))}
        if not due:
            return min(queue.oldest().arrived for queue in self._active) + self.max_delay_seconds
        queue = min(due, key=lambda q: (q.virtual_time, q.oldest().arrived))
        return self._release(queue, due[queue], idle)

    def _due(self, queue: Queue[T], now: float) -> ReleaseReason | None:
        if len(queue.waiting) >= queue.plan.largest:
            return "full"
        if not self.max_delay_seconds:
            return "idle"
        return "delay" if now >= queue.oldest().arrived + self.max_delay_seconds else None

    def _release(self, queue: Queue[T], reason: ReleaseReason, idle: int) -> Batch[T]:
        # An even share for each idle instance: two of one image each end sooner than one of two.
        share = ceil(len(queue.waiting) / idle)
        count = queue.plan.best(share)
        items = tuple(item for item, _ in zip(queue.waiting, range(count), strict=False))
        for item in items:
            self.discard(queue, item)
        self._virtual_time = queue.virtual_time
        queue.virtual_time += queue.plan.time(count)
        return Batch(queue, items, reason)


def fair_seconds(own: float, others: Iterable[float], instances: int) -> float:
    """Seconds until `own` seconds of one queue's work are done on `instances` shared fairly with the work of `others`.

    By the time that one queue has had `own`, each other has had as much, or all it asked for.
    """
    return (own + sum(min(own, other) for other in others)) / instances
