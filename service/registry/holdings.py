"""The models in memory: what is loaded beside what, within the byte budget, and what leaves."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from math import inf
from typing import Generic, Protocol, TypeVar

import structlog

from service.errors import MemoryBudgetExceeded, ModelLoadFailed, ServiceError
from service.eviction import Budget, Evict, Full, Held, credit, make_room, used_bytes
from service.registry.entries import Candidate, Entry, Reason
from service.registry.footprints import Footprint
from service.store.stored import StoredModel

M = TypeVar("M")

log = structlog.get_logger(component="registry")


class Source(Protocol[M]):
    """Where models come from and go to. What a loaded model is, only it knows."""

    async def candidates(self, name: str) -> Sequence[Candidate]:
        """The versions that `name` may stand for, the best first; at least one, else it raises."""
        ...

    async def load(self, stored: StoredModel) -> M:
        """Load it; what goes wrong is a ServiceError."""
        ...

    async def unload(self, only: list[M]) -> None:
        """Free the one model in `only`, which nobody else refers to any more, by taking it out; raises nothing."""
        ...

    def size(self, loaded: M) -> int:
        """The bytes of memory that it takes now."""
        ...

    def footprint(self, stored: StoredModel) -> Footprint:
        """What loading it takes: a guess before the first load, what was measured afterwards."""
        ...

    def left(self, reason: Reason) -> None:
        """A model left memory for `reason`."""
        ...


class Holdings(Generic[M]):
    """Loads and unloads, and keeps the sum of all footprints within `budget`. Its methods belong to one event loop."""

    def __init__(self, source: Source[M], budget: Budget, on_leaving: Callable[[Entry[M]], None]) -> None:
        """`on_leaving` is told of an entry that must not be used from now on."""
        self._source = source
        self._budget = budget
        self._on_leaving = on_leaving
        # Mutable state: the entries by identity, those on their way out, GreedyDual's inflation, and what wakes those
        # who wait for room.
        self._entries: dict[str, Entry[M]] = {}
        self._leaving: dict[Entry[M], asyncio.Task[None]] = {}
        self._inflation = 0.0
        self._changed: asyncio.Event | None = None

    def __iter__(self) -> Iterator[Entry[M]]:
        return iter([*self._entries.values()])

    def get(self, identity: str) -> Entry[M] | None:
        """The entry with this identity, unless it is on its way out."""
        return self._entries.get(identity)

    def begin(self, candidate: Candidate) -> Entry[M]:
        """The entry for `candidate`, on its way into memory if it is not there."""
        entry = self._entries.get(candidate.identity)
        if entry and not entry.failure:
            return entry
        for failed in [each for each in self if each.stored.key == candidate.stored.key and each.failure]:
            del self._entries[failed.candidate.identity]
        entry = Entry(candidate, now(), self._source.footprint(candidate.stored), self._source.size)
        self._entries[candidate.identity] = entry
        entry.task = asyncio.create_task(self._bring(entry))
        entry.task.add_done_callback(lambda _: self._brought(entry))
        return entry

    async def loaded(self, entry: Entry[M]) -> None:
        """Return when it is ready.

        Raises:
            ServiceError: it can't be loaded.
        """
        try:
            await asyncio.shield(entry.task)
        except ServiceError as error:
            # A copy: the task keeps its own, and on that the frames, and so the pictures, of all who waited would stay.
            raise copy(error) from None

    def hold(self, entry: Entry[M]) -> None:
        """It is used from now on."""
        entry.leases += 1

    def release(self, entry: Entry[M], *, used: bool = True) -> None:
        """Whoever held it does so no more."""
        entry.leases -= 1
        if used and entry.ready:
            self._use(entry)
        if not entry.leases:
            self.settle(entry)

    def settle(self, entry: Entry[M]) -> None:
        """Let go what nobody uses and no name stands for, or what is too much."""
        if entry.ready and not entry.leases and not entry.names:
            self._leave(entry, entry.reason)
        self._shrink()
        self._notify()

    def present(self, entry: Entry[M]) -> bool:
        """Whether it takes memory."""
        return entry.ready or entry in self._leaving

    def failed(self, candidate: Candidate) -> bool:
        """Whether it could not be loaded, and its files have not changed since."""
        entry = self._entries.get(candidate.identity)
        if entry is None or not isinstance(entry.failure, ModelLoadFailed):
            return False
        return entry.candidate.mark == candidate.mark

    def loading_seconds(self, entry: Entry[M]) -> float:
        """How long it will take until `entry` is there, as far as can be told: loads take turns."""
        waiting = [each for each in self if not each.task.done() and each.began <= entry.began]
        total = sum(each.footprint.seconds for each in waiting)
        return max(0.0, total - (now() - min((each.began for each in waiting), default=now())))

    async def changed(self, seconds: float | None = None) -> None:
        """Wait until something has been loaded, released or freed, or for `seconds`."""
        event = self._changed = self._changed or asyncio.Event()
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)

    async def close(self) -> None:
        """Give up loads under way and forget everything."""
        tasks = [*(entry.task for entry in self), *self._leaving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._entries.clear()
        self._leaving.clear()

    async def _bring(self, entry: Entry[M]) -> None:
        try:
            await self._make_room(entry)
            entry.loaded = await self._source.load(entry.stored)
        except BaseException:
            entry.admitted = False
            raise
        entry.footprint = self._source.footprint(entry.stored)
        entry.ready_at = now()
        self._use(entry)

    def _brought(self, entry: Entry[M]) -> None:
        _ = entry.failure  # retrieved, should every caller have gone
        self.settle(entry)

    def _use(self, entry: Entry[M]) -> None:
        entry.used_at = now()
        entry.credit = credit(self._inflation, entry.footprint.seconds, entry.bytes)

    def _leave(self, entry: Entry[M], reason: Reason) -> asyncio.Task[None]:
        entry.leaving = True
        del self._entries[entry.candidate.identity]
        self._on_leaving(entry)
        self._source.left(reason)
        log.info("model_unloading", model=entry.stored.id, version=entry.stored.version, reason=reason)
        task = self._leaving[entry] = asyncio.create_task(self._unload(entry))
        return task

    async def _unload(self, entry: Entry[M]) -> None:
        assert entry.loaded is not None  # noqa: S101  it was ready
        only, entry.loaded = [entry.loaded], None
        try:
            await self._source.unload(only)
        finally:
            self._leaving.pop(entry, None)
            self._notify()

    def _notify(self) -> None:
        if self._changed:
            self._changed.set()
            self._changed = None

    def _held(self) -> list[Held]:
        admitted = [entry for entry in self if entry.admitted]
        time = now()
        return [each.held(self._budget.min_residency_seconds, time) for each in (*admitted, *self._leaving)]

    async def _make_room(self, entry: Entry[M]) -> None:
        """Evict until `entry` fits, or wait a while for what is in use."""
        if (limit := self._budget.bytes) is None:
            entry.admitted = True
            return
        give_up = now() + self._budget.patience_seconds
        while True:
            time = now()
            decision = make_room(self._held(), entry.footprint.bytes, limit, time, self._inflation)
            if isinstance(decision, Full):
                if decision.until >= give_up:
                    raise self._refusal(entry, limit, decision.until - time)
                await self.changed((decision.until if decision.until > time else give_up) - time)
            elif not decision.keys:
                entry.admitted = True
                return
            else:
                await asyncio.wait(self._evict(decision))

    def _shrink(self) -> None:
        """Evict what can be, where loads turned out larger than was thought."""
        if (limit := self._budget.bytes) is not None:
            decision = make_room(self._held(), 0, limit, now(), self._inflation)
            if isinstance(decision, Evict):
                self._evict(decision)

    def _evict(self, decision: Evict) -> list[asyncio.Task[None]]:
        self._inflation = decision.inflation
        return [self._leave(self._entries[key], "budget") for key in decision.keys]

    def _refusal(self, entry: Entry[M], limit: int, seconds: float) -> MemoryBudgetExceeded:
        needed, held = entry.footprint.bytes, self._held()
        kept = [each for each in (*self, *self._leaving) if each.admitted]
        names = ", ".join(f"{each.stored.key} {_mb(each.bytes)} {each.hold() or 'just loaded'}" for each in kept)
        about = "" if entry.footprint.measured else "about "
        taken = f"{_mb(used_bytes(held))} are taken by what can't leave now ({names})" if names else "nothing is loaded"
        advice = "ask again later, unpin or unload a model, or raise" if needed <= limit else "it never fits; raise"
        return MemoryBudgetExceeded(
            f"{entry.stored.key} needs {about}{_mb(needed)}, PVT_MEMORY_BUDGET_MB allows {_mb(limit)} and {taken}; "
            f"{advice} PVT_MEMORY_BUDGET_MB",
            seconds if seconds < inf else None,
        )


def now() -> float:
    """Seconds on the event loop's clock."""
    return asyncio.get_running_loop().time()


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
