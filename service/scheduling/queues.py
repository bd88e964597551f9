"""What waits, and which of it is next. Pure decisions: no clock, no task, no thread. Times are the caller's seconds."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Generic, Literal, TypeVar

from service.execution.plan import BatchPlan

ReleaseReason = Literal["idle", "full", "delay"]


@dataclass(eq=False, slots=True, kw_only=True)
class Item:
    """What waits in a queue; times are seconds on the caller's clock."""

    arrived: float = 0.0
    deadline: float = inf


I = TypeVar("I", bound=Item)  # noqa: E741


@dataclass(eq=False, slots=True)
class Queue(Generic[I]):
    """What waits for one model.

    `plan` rules its batches. Without one, items are taken one by one and cost nothing in advance: the caller adds the
    time that they took to `virtual_time`, which is the share of the instances it has had, in seconds, for fairness.
    """

    plan: BatchPlan | None
    virtual_time: float = 0.0
    waiting: dict[I, None] = field(default_factory=dict)  # a dict, since it keeps the order and removes in O(1)

    def oldest(self) -> I:
        """The item that has waited longest."""
        return next(iter(self.waiting))

    @property
    def full(self) -> bool:
        """Whether the largest batch waits."""
        return len(self.waiting) >= (self.plan.largest if self.plan else 1)


@dataclass(frozen=True, slots=True)
class Batch(Generic[I]):
    """Items of one queue that run together, and why they were released now."""

    queue: Queue[I]
    items: tuple[I, ...]
    reason: ReleaseReason


class Queues(Generic[I]):
    """The queues of all models for threads or instances that they share."""

    def __init__(self, max_delay_seconds: float = 0.0) -> None:
        """`max_delay_seconds`: how long a batch that is not full may be held back while an instance is idle."""
        self.max_delay_seconds = max_delay_seconds
        # Mutable state: the queues in which something waits, and the virtual time of the one that was served last.
        self._active: dict[Queue[I], None] = {}
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return sum(len(queue.waiting) for queue in self._active)

    def add(self, queue: Queue[I], item: I) -> None:
        """Put `item` at the end of `queue`."""
        if not queue.waiting:
            # A queue that was empty has saved nothing up: it joins at the present virtual time.
            queue.virtual_time = max(queue.virtual_time, self._virtual_time)
            self._active[queue] = None
        queue.waiting[item] = None

    def discard(self, queue: Queue[I], item: I) -> bool:
        """Remove `item`; False if it did not wait any more."""
        if item not in queue.waiting:
            return False
        del queue.waiting[item]
        if not queue.waiting:
            del self._active[queue]
        return True

    def expire(self, now: float) -> Iterator[tuple[Queue[I], I]]:
        """Remove and yield every item whose deadline has passed."""
        expired = [(queue, item) for queue in self._active for item in queue.waiting if item.deadline <= now]
        for queue, item in expired:
            self.discard(queue, item)
            yield queue, item

    def take(self, now: float, idle: int) -> Batch[I] | float | None:
        """What one of `idle` free instances does now.

        1. Nothing waits: None.
        2. Something is due: the batch of the queue that has had the least of the instances so far. Among equals the
           oldest item decides.
        3. Batches are held back by the delay: the time at which the first of them is due.
        """
        if not self._active:
            return None
        due = {queue: reason for queue in self._active if (reason := self._due(queue, now))}
        if not due:
            return min(queue.oldest().arrived for queue in self._active) + self.max_delay_seconds
        queue = min(due, key=lambda q: (q.virtual_time, q.oldest().arrived))
        return self._release(queue, due[queue], idle)

    def _due(self, queue: Queue[I], now: float) -> ReleaseReason | None:
        if queue.full:
            return "full"
        if not self.max_delay_seconds:
            return "idle"
        return "delay" if now >= queue.oldest().arrived + self.max_delay_seconds else None

    def _release(self, queue: Queue[I], reason: ReleaseReason, idle: int) -> Batch[I]:
        # An even share for each idle instance: two of one image each end sooner than one of two.
        share = ceil(len(queue.waiting) / idle)
        count = queue.plan.best(share) if queue.plan else 1
        items = tuple(item for item, _ in zip(queue.waiting, range(count), strict=False))
        for item in items:
            self.discard(queue, item)
        self._virtual_time = queue.virtual_time
        queue.virtual_time += queue.plan.time(count) if queue.plan else 0.0
        return Batch(queue, items, reason)


def fair_seconds(own: float, others: Iterable[float], instances: int) -> float:
    """Seconds until `own` seconds of one queue's work are done on `instances` shared fairly with the work of `others`.

    By the time that one queue has had `own`, each other has had as much, or all of its work.
    """
    return (own + sum(min(own, other) for other in others)) / instances
