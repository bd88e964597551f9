"""What waits, and which of it is next. Pure decisions: no clock, task or thread."""

from collections.abc import Iterator
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
    """What waits for one model; `virtual_time` is the instance time that it has had, for fairness.

    `plan` rules its batches. Without one, items are taken one by one, and the caller adds the time that they took.
    """

    plan: BatchPlan | None
    virtual_time: float = 0.0
    waiting: dict[I, None] = field(default_factory=dict)  # a dict keeps the order and removes in O(1)

    @property
    def since(self) -> float:
        """When the item that has waited longest arrived."""
        return next(iter(self.waiting)).arrived


@dataclass(frozen=True, slots=True)
class Batch(Generic[I]):
    """Items of one queue that run together, and why they were released now."""

    queue: Queue[I]
    items: tuple[I, ...]
    reason: ReleaseReason


class Queues(Generic[I]):
    """The queues of all models for the threads or instances that they share.

    `max_delay_seconds` is how long a batch that is not full may wait while an instance is idle.
    """

    def __init__(self, max_delay_seconds: float = 0.0) -> None:
        self.max_delay_seconds = max_delay_seconds
        # Mutable state: the queues in which something waits, and the virtual time of the last one served.
        self._active: dict[Queue[I], None] = {}
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return sum(len(queue.waiting) for queue in self._active)

    def add(self, queue: Queue[I], item: I) -> None:
        """Put `item` at the end of `queue`."""
        if not queue.waiting:
            # An idle queue saves nothing up: it joins at the present virtual time.
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
            return min(queue.since for queue in self._active) + self.max_delay_seconds
        queue = min(due, key=lambda q: (q.virtual_time, q.since))
        return self._release(queue, due[queue], idle)

    def _due(self, queue: Queue[I], now: float) -> ReleaseReason | None:
        if len(queue.waiting) >= (queue.plan.largest if queue.plan else 1):
            return "full"
        if not self.max_delay_seconds:
            return "idle"
        return "delay" if now >= queue.since + self.max_delay_seconds else None

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
