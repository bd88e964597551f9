"""What waits, and which of it is next. Pure decisions: no clock, task or thread."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Generic, Literal, TypeVar

from service.execution.plan import BatchPlan

ReleaseReason = Literal["idle", "full", "delay"]
BATCH_MATES = 2.0
_REMEMBERED = 32  # clients, before those for whom nothing waits are looked through


@dataclass(eq=False, slots=True, kw_only=True)
class Item:
    """What waits in a queue, for whom, and as a part of which request; times are seconds on the caller's clock.

    After `latest` it is no good to start it.
    """

    arrived: float = 0.0
    latest: float = inf
    client: str = ""
    request: object = None


I = TypeVar("I", bound=Item)  # noqa: E741


@dataclass(eq=False, slots=True)
class Share(Generic[I]):
    """What waits for one client, by request; `virtual_time` is the time that it has had."""

    virtual_time: float
    requests: dict[object, dict[I, None]] = field(default_factory=dict)
    count: int = 0  # of items, in all requests

    def take(self) -> I:
        """The first item of the request whose turn it is; the request then goes behind the others."""
        self.count -= 1
        request, items = next(iter(self.requests.items()))
        item = next(iter(items))
        del items[item], self.requests[request]
        if items:
            self.requests[request] = items
        return item


@dataclass(eq=False, slots=True)
class Queue(Generic[I]):
    """What waits for one model; `virtual_time` is the instance time that it has had, for fairness.

    Of its clients the one that has had the least time is served first, and of a client's requests one image each in
    turn. `plan` rules its batches. Without one, items are taken one by one, and the caller charges the time that they
    take.
    """

    plan: BatchPlan | None
    virtual_time: float = 0.0
    # Mutable state: what waits, oldest first; the shares of clients, also of those with nothing waiting that have had
    # more than the others; the virtual time of the client that was served last.
    waiting: dict[I, None] = field(default_factory=dict)  # a dict keeps the order and removes in O(1)
    _shares: dict[str, Share[I]] = field(default_factory=dict)
    _present: float = 0.0

    @property
    def since(self) -> float:
        """When the item that has waited longest arrived."""
        return next(iter(self.waiting)).arrived

    def add(self, item: I) -> None:
        """Put `item` at the end of its request; a client that comes anew saves nothing up, and owes what it owed."""
        self.waiting[item] = None
        share = self._shares.get(item.client)
        if share is None:
            share = self._shares[item.client] = Share(self._present)
        elif not share.requests:
            share.virtual_time = max(share.virtual_time, self._present)
        share.requests.setdefault(item.request or item, {})[item] = None
        share.count += 1

    def remove(self, item: I) -> None:
        """Remove `item`, which waits."""
        del self.waiting[item]
        share, request = self._shares[item.client], item.request or item
        del share.requests[request][item]
        share.count -= 1
        if not share.requests[request]:
            del share.requests[request]
            self._forget()

    def take(self, seconds: float = 0.0) -> I:
        """Remove the item that is next, and charge its client `seconds`."""
        waiting = [share for share in self._shares.values() if share.requests]
        share = waiting[0] if len(waiting) == 1 else min(waiting, key=lambda each: each.virtual_time)
        item = share.take()
        del self.waiting[item]
        self._present = max(self._present, share.virtual_time)
        share.virtual_time += seconds
        if not share.requests:
            self._forget()
        return item

    def together(self, plan: BatchPlan, most: int) -> int:
        """How many items run together, of at most `most`: a client that is next and has few is not held up by many.

        Few are no more than an even share of what waits. Images of clients that have more join those of clients that
        have few as long as the batch takes at most BATCH_MATES times as long.
        """
        shares = [share for share in self._shares.values() if share.count]
        even = len(self.waiting) / len(shares)
        if min(shares, key=lambda each: each.virtual_time).count > even:
            return most
        few = sum(share.count for share in shares if share.count <= even)
        if few >= most:
            return most
        longest = BATCH_MATES * plan.time(few)
        return max(few, *(size for size in plan.sizes if size <= most and plan.time(size) <= longest))

    def charge(self, client: str, seconds: float) -> None:
        """Charge the queue, and `client` in it, what the last item taken for it took beyond what was expected."""
        self.virtual_time += seconds
        share = self._shares.get(client)
        if share is None:
            share = self._shares[client] = Share(self._present)
        share.virtual_time += seconds

    def newest(self, client: str) -> I | None:
        """The item of `client` that came last."""
        return next((item for item in reversed(self.waiting) if item.client == client), None)

    def _forget(self) -> None:
        """Clients for whom nothing waits are forgotten once the others have had as much; all if nobody waits."""
        if not self.waiting:
            self._shares.clear()
        elif len(self._shares) > _REMEMBERED:
            idle = [name for name, each in self._shares.items() if not each.requests]
            for name in idle:
                if self._shares[name].virtual_time <= self._present:
                    del self._shares[name]


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
        # Mutable state: the queues in which something waits; the virtual time of the last one served; a time before
        # which nothing is too late.
        self._active: dict[Queue[I], None] = {}
        self._virtual_time = 0.0
        self.all_in_time = inf

    def __len__(self) -> int:
        return sum(len(queue.waiting) for queue in self._active)

    def __bool__(self) -> bool:
        return bool(self._active)

    def add(self, queue: Queue[I], item: I) -> None:
        """Put `item` into `queue`."""
        if not queue.waiting:
            # An idle queue saves nothing up: it joins at the present virtual time.
            queue.virtual_time = max(queue.virtual_time, self._virtual_time)
            self._active[queue] = None
        queue.add(item)
        self.all_in_time = min(self.all_in_time, item.latest)

    def discard(self, queue: Queue[I], item: I) -> bool:
        """Remove `item`; False if it did not wait any more."""
        if item not in queue.waiting:
            return False
        queue.remove(item)
        if not queue.waiting:
            del self._active[queue]
        return True

    def expire(self, now: float) -> Iterator[tuple[Queue[I], I]]:
        """Remove and yield every item that is too late to start."""
        if now < self.all_in_time:
            return
        waiting = [(queue, item) for queue in self._active for item in queue.waiting]
        self.all_in_time = min((item.latest for _, item in waiting if item.latest > now), default=inf)
        for queue, item in waiting:
            if item.latest <= now:
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
        if queue.plan and count > 1:
            count = queue.together(queue.plan, count)
        seconds = queue.plan.time(count) if queue.plan else 0.0
        self._virtual_time = queue.virtual_time
        queue.virtual_time += seconds
        items = tuple([queue.take(seconds / count) for _ in range(count)])
        if not queue.waiting:
            del self._active[queue]
        return Batch(queue, items, reason)
