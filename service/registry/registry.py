"""The models in memory and those on their way there: loaded once for all who wait, replaced while they serve, evicted.

Every request asks for a model by a name, and a name stands for a version. Hot reload, aliases, rollback and unloading
all change what a name stands for; a version without a name is unloaded with its last lease. So no request ever waits
for a swap. What a loaded model is, only the loader knows: here it is an `M`.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, NamedTuple, TypeVar

import structlog

from service.errors import ModelLoadFailed, ModelLoading, ModelNotFound, ModelPinned, ServiceError, WeightsUnavailable
from service.options import Budget
from service.registry.entries import Candidate, Entry, EntryStatus, Finder, Loader, UnloadReason
from service.registry.residency import Evict, Full, Hold, MemoryUse, credit, make_room, no_room
from service.sharing import RecentErrors, fresh, shared

M = TypeVar("M")

log = structlog.get_logger(component="registry")

FAILURE_SECONDS = 10.0  # how long a load that failed is reported to requests that would not wait for another one


class _Target(NamedTuple, Generic[M]):
    """What a name stands for, as found in the numbered `turn`."""

    entry: Entry[M]
    turn: int


@dataclass(eq=False, slots=True)
class _Arrival(Generic[M]):
    """A name on its way to a model that is ready. It leases that model until all who wait have their own lease."""

    name: str
    turn: int
    task: "asyncio.Task[None]" = field(init=False)
    # Mutable state: what it leases, which is being loaded or ready; how many wait.
    entry: Entry[M] | None = None
    waiting: int = 0


class Registry(Generic[M]):
    """Leases of loaded models, by any of their names, within a byte budget. Its methods belong to one event loop."""

    def __init__(self, finder: Finder, loader: Loader[M], budget: Budget = Budget()) -> None:  # noqa: B008  frozen
        self._finder = finder
        self._loader = loader
        self._budget = budget
        self._turns = count()
        self._one_refresh = asyncio.Lock()
        # Mutable state: the entries by identity, and those that are being unloaded; what each name stands for; pinned
        # names, each with the calls of `pin` under way or one that succeeded; names on their way, and what lately went
        # wrong with which; GreedyDual's inflation; what wakes those who wait for room or for an unloading; and why a
        # name could not be refreshed, so that it is logged once.
        self._entries: dict[str, Entry[M]] = {}
        self._unloading: dict[Entry[M], asyncio.Task[None]] = {}
        self._names: dict[str, _Target[M]] = {}
        self._pins: dict[str, set[object]] = {}
        self._arrivals: dict[str, _Arrival[M]] = {}
        self._failures = RecentErrors(FAILURE_SECONDS)
        self._inflation = 0.0
        self._changed: asyncio.Event | None = None
        self._not_refreshed: dict[str, str] = {}

    # The states of an entry, and every transition:
    #
    #     (none) --1--> waiting --2--> loading --4--> ready --5--> unloading --6--> (none)
    #                      |              |
    #                      +------3-------+---------> failed -----------7---------> (none)
    #
    # 1. `_begin`: a name may stand for a version that is not in memory. Its task starts.
    # 2. `_reserve`: it has room within the budget, and counts from now on.
    # 3. `_load`: there is no room, or it can't be loaded. The arrival goes on to the next candidate.
    # 4. `_load`: it can be leased, and names come to stand for it.
    # 5. `_unload`: no name stands for it and it has no lease, or it is evicted. It can't be leased any more; a request
    #    for the same version begins another entry.
    # 6. `_free`: its memory is free.
    # 7. `_begin`: that version is tried again.

    def __repr__(self) -> str:
        return f"<Registry { ({each.stored.key: each.state for each in self.all()}) }>"

    @asynccontextmanager
    async def lease(self, name: str, max_wait_seconds: float | None = None) -> AsyncIterator[M]:
        """The model called `name`, loaded if need be, for as long as the context lasts.

        A caller that is cancelled while it waits, or waits no longer than `max_wait_seconds`, does not stop the load.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has no such model, or not its weights.
            ModelLoadFailed: no version of it could be loaded; the next lease tries again.
            MemoryBudgetExceeded: there is no room for it.
            ModelLoading: `max_wait_seconds` are over; the load goes on.
        """
        entry = self._lease_ready(name) or await self._arrive(name, max_wait_seconds)
        try:
            assert entry.loaded is not None  # noqa: S101  it is ready, and leased
            yield entry.loaded
        finally:
            self._release(entry)

    async def pin(self, name: str) -> None:
        """Load the model called `name`, and never evict it, nor what that name stands for later.

        Raises:
            ServiceError: as `lease`; it is not pinned then.
        """
        attempt = object()
        self._pins.setdefault(name, set()).add(attempt)
        try:
            async with self.lease(name):
                pass
        except BaseException:
            self._pins.get(name, set()).discard(attempt)
            if not self._pins.get(name):
                self.unpin(name)
            raise
        if attempt in self._pins.get(name, ()):  # else `unpin` was called meanwhile
            self._pins[name] = {attempt}

    def unpin(self, name: str) -> None:
        """Let the model called `name` be evicted again, whatever still tries to pin it."""
        self._pins.pop(name, None)
        if entry := self._entry(name):
            self._settle(entry)

    async def unload(self, name: str) -> None:
        """Free every version in memory of the model called `name`, or the one it names, once nobody uses them.

        A version that is requested or pinned meanwhile stays.

        Raises:
            ModelPinned: one of them is pinned; nothing was done.
        """
        named = self._entry(name)
        entries = [e for e in self._entries.values() if name in {e.stored.id, e.stored.key} or e is named]
        if pinned := [each.stored.key for each in entries if self._pinned(each)]:
            raise ModelPinned(f"{', '.join(pinned)} is pinned; unpin it first (DELETE /models/{name}/pin)")
        for entry in entries:
            await asyncio.wait([entry.task])
            if not self._pinned(entry):
                entry.reason = "unloaded"
                self._forget_names(entry)
                self._settle(entry)
        while any((e.state == "ready" and not self._names_of(e)) or e in self._unloading for e in entries):
            await self._change()

    async def refresh(self, *, again: bool = False) -> None:
        """Find what each name stands for now, and load what is new beside what serves; then the names pass to it.

        What fails leaves things as they are, and is not tried again until its files change, or `again` says so.
        """
        async with self._one_refresh:
            for name in [*self._names]:
                await self._refresh(name, again=again)

    def named(self, name: str) -> EntryStatus[M] | None:
        """The model in memory that `name` stands for."""
        entry = self._entry(name)
        return self._status(entry) if entry else None

    def all(self) -> list[EntryStatus[M]]:
        """Every version that is in memory, on its way there, or failed."""
        return [self._status(entry) for entry in self._entries.values()]

    def loaded(self) -> list[M]:
        """Every model that is ready."""
        return [each.loaded for each in self.all() if each.loaded is not None]

    async def close(self) -> None:
        """Give up loads under way and forget everything."""
        arrivals = [arrival.task for arrival in self._arrivals.values()]
        tasks = [*arrivals, *(entry.task for entry in self._entries.values()), *self._unloading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for state in (self._entries, self._unloading, self._names, self._pins):
            state.clear()

    # Arrivals: from a name to a lease.

    def _lease_ready(self, name: str) -> Entry[M] | None:
        entry = self._entry(name)  # which is ready, as all that names stand for
        if entry:
            entry.leases += 1
        return entry

    async def _arrive(self, name: str, max_wait_seconds: float | None) -> Entry[M]:
        """A lease of what `name` stands for, once that is ready. All who wait for the name share one arrival."""
        arrival = self._arrivals.get(name)
        if arrival is None:
            if max_wait_seconds is not None and (failure := self._failures.get(name)):
                raise failure
            turn = next(self._turns)
            found = await self._finder.obtain(name, max_wait_seconds)
            candidates = [each for each in found if not self._failed(each)] or found
            if entry := self._lease_ready(name):
                return entry
            known = self._entries.get(candidates[0].identity)
            if known and known.state == "ready":  # only the name was not known
                known.leases += 1
                self._point(name, known, turn)
                return known
            arrival = self._arrivals.get(name) or self._set_out(name, turn, candidates)
        arrival.waiting += 1
        try:
            await shared(arrival.task, max_wait_seconds)
        except TimeoutError:
            raise self._not_yet(name, arrival.entry) from None
        else:
            assert arrival.entry is not None  # noqa: S101  it is leased until nobody waits
            arrival.entry.leases += 1
            return arrival.entry
        finally:
            arrival.waiting -= 1
            self._end(arrival)

    def _set_out(self, name: str, turn: int, candidates: Sequence[Candidate]) -> _Arrival[M]:
        arrival = self._arrivals[name] = _Arrival[M](name, turn)
        arrival.task = asyncio.create_task(self._load_first(arrival, candidates))
        arrival.task.add_done_callback(lambda _: self._end(arrival))
        return arrival

    async def _load_first(self, arrival: _Arrival[M], candidates: Sequence[Candidate]) -> None:
        """Load the first of `candidates` that can be, and let the name stand for it."""
        failures: list[ServiceError] = []
        for candidate in candidates:
            entry = arrival.entry = self._begin(candidate)
            try:
                await self._ready(entry)
            except BaseException as error:
                arrival.entry = None
                self._release(entry)
                if not isinstance(error, ModelLoadFailed | WeightsUnavailable):
                    raise
                failures.append(error)
            else:
                self._point(arrival.name, entry, arrival.turn)
                return
        raise failures[0]

    def _end(self, arrival: _Arrival[M]) -> None:
        """Take an arrival that is over off the list; release its own lease once nobody waits for it any more."""
        if not arrival.task.done():
            return
        if self._arrivals.get(arrival.name) is arrival:
            del self._arrivals[arrival.name]
            self._failures.note(arrival.name, arrival.task)
        if not arrival.waiting and arrival.entry:
            entry, arrival.entry = arrival.entry, None
            self._release(entry)

    def _failed(self, candidate: Candidate) -> bool:
        """Whether it could not be loaded, and its files have not changed since."""
        entry = self._entries.get(candidate.identity)
        if entry is None or not isinstance(entry.failure, ModelLoadFailed):
            return False
        return entry.candidate.mark == candidate.mark

    def _not_yet(self, name: str, entry: Entry[M] | None) -> ModelLoading:
        """Says how long it will take until `entry` is ready, as far as is known: loads take turns."""
        queued = [e for e in self._entries.values() if e.state in {"waiting", "loading"}]
        queued = [each for each in queued if entry and each.began <= entry.began]
        seconds = sum(each.footprint.seconds for each in queued)
        seconds = max(0.0, seconds - (now() - min((each.began for each in queued), default=now())))
        return ModelLoading(
            f"{name} is being loaded, which takes about {seconds:.1f} s more; ask again then, or wait for it: without "
            "'Prefer: respond-async', and with PVT_COLD=wait",
            seconds,
        )

    # Names, and what they stand for.

    def _point(self, name: str, entry: Entry[M], turn: int) -> None:
        """Let `name` stand for `entry`, unless what it stands for was found after `turn` began."""
        before = self._names.get(name)
        if before and before.turn > turn:
            return
        self._names[name] = _Target(entry, turn)
        self._settle(before.entry if before else entry)

    def _entry(self, name: str) -> Entry[M] | None:
        target = self._names.get(name)
        return target.entry if target else None

    def _names_of(self, entry: Entry[M]) -> list[str]:
        return [name for name, target in self._names.items() if target.entry is entry]

    def _forget_names(self, entry: Entry[M]) -> None:
        for name in self._names_of(entry):
            del self._names[name]

    def _pinned(self, entry: Entry[M]) -> bool:
        return not self._pins.keys().isdisjoint(self._names_of(entry))

    async def _refresh(self, name: str, *, again: bool) -> None:
        turn = next(self._turns)
        try:
            candidates = await self._find_again(name)
        except ServiceError as error:
            if self._not_refreshed.get(name) != str(error):
                log.warning("model_not_refreshed", model=name, reason=str(error))
            self._not_refreshed[name] = str(error)
            return
        self._not_refreshed.pop(name, None)
        serving = self._entry(name)
        if serving is None:
            return
        serving.leases += 1  # what serves is not evicted for its successor
        try:
            for candidate in candidates:
                if candidate.identity == serving.candidate.identity:
                    break
                if (again or not self._failed(candidate)) and await self._replace(name, serving, candidate, turn):
                    break
        finally:
            self._release(serving, used=False)

    async def _find_again(self, name: str) -> Sequence[Candidate]:
        """What `name` stands for in the store. A name that is gone is forgotten, unless its model is gone too."""
        try:
            return await self._finder.find(name)
        except ModelNotFound:
            serving = self._entry(name)
            if serving is None or serving.stored.id == name:
                raise
            await self._finder.find(serving.stored.id)
            if self._entry(name) is serving:
                log.info("name_gone", name=name, stood_for=serving.stored.key)
                del self._names[name]
                self._settle(serving)
            return ()

    async def _replace(self, name: str, serving: Entry[M], candidate: Candidate, turn: int) -> bool:
        """Whether `candidate` is ready, and `name` stands for it if it still stood for `serving`."""
        entry = self._begin(candidate)
        version, serves = candidate.stored.key, serving.stored.key
        try:
            await self._ready(entry)
            if self._entry(name) is serving:
                self._point(name, entry, turn)
                log.info("model_replaced", name=name, version=version, served_before=serves)
        except ServiceError as error:
            log.warning("model_not_replaced", name=name, version=version, still_serves=serves, reason=str(error))
            return False
        finally:
            self._release(entry, used=False)
        return True

    # Entries: the transitions.

    def _begin(self, candidate: Candidate) -> Entry[M]:
        """A lease of the entry of `candidate`, which is on its way into memory if it was not there."""
        entry = self._entries.get(candidate.identity)
        if entry is None or entry.state == "failed":
            for other in [*self._entries.values()]:
                if other.state == "failed" and other.stored.key == candidate.stored.key:
                    del self._entries[other.candidate.identity]  # 7
            entry = Entry[M](candidate, now(), self._loader.footprint(candidate.stored))
            self._entries[candidate.identity] = entry
            entry.task = asyncio.create_task(self._load(entry))  # 1
        entry.leases += 1
        return entry

    async def _load(self, entry: Entry[M]) -> None:
        try:
            await self._reserve(entry)
            entry.loaded = await self._loader.load(entry.stored)
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            entry.failure = ServiceError("loading was cancelled") if cancelled else fresh(error)
            entry.state = "failed"  # 3
            if not isinstance(error, Exception):
                raise
        else:
            entry.footprint = self._loader.footprint(entry.stored)
            entry.ready_at = now()
            entry.state = "ready"  # 4
            self._use(entry)
        self._settle(entry)

    async def _ready(self, entry: Entry[M]) -> None:
        """Return when it is ready; raises why it can't be loaded."""
        await asyncio.wait([entry.task])
        if entry.failure:
            raise fresh(entry.failure) from None

    def _release(self, entry: Entry[M], *, used: bool = True) -> None:
        entry.leases -= 1
        if used and entry.state == "ready":
            self._use(entry)
        if not entry.leases:
            self._settle(entry)

    def _use(self, entry: Entry[M]) -> None:
        entry.used_at = now()
        entry.credit = credit(self._inflation, entry.footprint.seconds, self._bytes(entry))

    def _settle(self, entry: Entry[M]) -> None:
        """Something about `entry` has changed: unload it if nothing keeps it, then what is too much beside it."""
        if entry.state == "ready" and not entry.leases and not self._names_of(entry):
            self._unload(entry, entry.reason)
        if (limit := self._budget.bytes) is not None:
            # Loads may have turned out larger than was thought.
            decision = make_room(self._memory(), 0, limit, now(), self._inflation)
            if isinstance(decision, Evict):
                self._evict(decision)
        self._notify()

    def _evict(self, decision: Evict) -> list["asyncio.Task[None]"]:
        self._inflation = decision.inflation
        return [self._unload(self._entries[key], "budget") for key in decision.keys]

    def _unload(self, entry: Entry[M], reason: UnloadReason) -> "asyncio.Task[None]":
        entry.state = "unloading"  # 5
        del self._entries[entry.candidate.identity]
        self._forget_names(entry)
        self._loader.unloading(reason)
        log.info("model_unloading", model=entry.stored.id, version=entry.stored.version, reason=reason)
        task = self._unloading[entry] = asyncio.create_task(self._free(entry))
        return task

    async def _free(self, entry: Entry[M]) -> None:
        assert entry.loaded is not None  # noqa: S101  it was ready
        only, entry.loaded = [entry.loaded], None
        try:
            await self._loader.unload(only)
        finally:
            self._unloading.pop(entry, None)  # 6
            self._notify()

    def _notify(self) -> None:
        if self._changed:
            self._changed.set()
            self._changed = None

    async def _change(self, seconds: float | None = None) -> None:
        """Wait until something was loaded, released or freed, or for `seconds`."""
        event = self._changed = self._changed or asyncio.Event()
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)

    # The budget.

    async def _reserve(self, entry: Entry[M]) -> None:
        """Evict until `entry` fits, or wait a while for what is in use."""
        give_up = now() + self._budget.max_wait_seconds
        while (limit := self._budget.bytes) is not None:
            time = now()
            decision = make_room(self._memory(), entry.footprint.bytes, limit, time, self._inflation)
            if isinstance(decision, Full):
                if decision.until >= give_up:
                    raise no_room(entry.stored.key, entry.footprint, limit, self._memory(), decision.until - time)
                await self._change((decision.until if decision.until > time else give_up) - time)
            elif decision.keys:
                await asyncio.wait(self._evict(decision))
            else:
                break
        entry.state = "loading"  # 2

    def _memory(self) -> list[MemoryUse]:
        time, stay = now(), self._budget.min_residency_seconds
        entries = [*(e for e in self._entries.values() if e.state in {"loading", "ready"}), *self._unloading]
        return [
            MemoryUse(
                key=each.candidate.identity,
                name=each.stored.key,
                bytes=self._bytes(each),
                credit=each.credit,
                used_at=each.used_at,
                evictable_at=min(each.ready_at, time) + stay,
                hold=self._hold(each),
            )
            for each in entries
        ]

    def _bytes(self, entry: Entry[M]) -> int:
        """What it takes, as measured once it is loaded."""
        return entry.footprint.bytes if entry.loaded is None else self._loader.memory_bytes(entry.loaded)

    def _hold(self, entry: Entry[M]) -> Hold:
        """What keeps it from being evicted, if anything does."""
        if entry.state == "unloading":
            return "unloading"
        if self._pinned(entry):
            return "pinned"
        if entry.state == "loading":
            return "loading"
        return "in use" if entry.leases else ""

    def _status(self, entry: Entry[M]) -> EntryStatus[M]:
        if entry.state in {"waiting", "loading"}:
            return EntryStatus(entry.stored, "loading", leases=entry.leases, pinned=self._pinned(entry))
        if entry.failure:
            return EntryStatus(entry.stored, "failed", failure=entry.failure)
        idle = 0.0 if entry.leases else now() - entry.used_at
        return EntryStatus(
            entry.stored, "ready", entry.loaded, None, entry.leases, self._pinned(entry), idle, self._bytes(entry)
        )


def now() -> float:
    """Seconds on the event loop's clock."""
    return asyncio.get_running_loop().time()
