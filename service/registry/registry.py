"""The models in memory and those on their way there: loaded once for all who wait, replaced while they serve, evicted.

Every request gives a name, and a name stands for a version from the moment that its load begins. Hot reload, aliases,
rollback and unloading all change what a name stands for; a version without a name is unloaded after its last lease. So
no request ever waits for a swap. What a loaded model is, only the loader knows: to the registry it is an `M`.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from types import TracebackType
from typing import Generic, TypeVar

import structlog

from service.errors import (
    AnswersWrong,
    ModelLoadFailed,
    ModelLoading,
    ModelNotFound,
    ModelPinned,
    ServiceError,
    WeightsUnavailable,
)
from service.options import Budget
from service.registry.residency import Full, MemoryUse, credit, make_room, no_room, used_bytes
from service.registry.versions import Candidate, Entry, Finder, Loader, UnloadReason, VersionStatus
from service.sharing import cancel, fresh, shared

M = TypeVar("M")

log = structlog.get_logger(component="registry")

_LOOK_AGAIN_SECONDS = 0.25  # for memory that requests have freed, which wakes nobody
WRONG_AGAIN_SECONDS = 3600.0  # a model whose answers are wrong twice within that time fails
FAILURE_SECONDS = 10.0  # how long a failure is reported to requests that would not wait for another attempt


class Registry(Generic[M]):
    """Leases of loaded models, by any of their names, within a byte budget. Its methods belong to one event loop."""

    def __init__(self, finder: Finder, loader: Loader[M], budget: Budget = Budget()) -> None:  # noqa: B008  frozen
        self._finder = finder
        self._loader = loader
        self._budget = budget
        self._one_refresh = asyncio.Lock()
        # Mutable state: the entries by identity, and those that are being unloaded; what each name stands for; pinned
        # names, and the name of each call of `pin` under way; GreedyDual's inflation; what wakes those who wait for
        # room or an unloading, and clear it first; why a name could not be refreshed, so that it is logged once; and
        # when answers of a version were wrong.
        self._entries: dict[str, Entry[M]] = {}
        self._unloading: set[Entry[M]] = set()
        self._names: dict[str, Entry[M]] = {}
        self._pins: set[str] = set()
        self._pinning: dict[object, str] = {}
        self._inflation = 0.0
        self._changed = asyncio.Event()
        self._not_refreshed: dict[str, str] = {}
        self._distrusted: dict[str, float] = {}

    # The states of an entry, and every transition:
    #
    #     (none) --1--> waiting --2--> loading --4--> ready --5--> unloading --6--> (none)
    #                      |              |
    #                      +------3-------+---------> failed -----------7---------> (none)
    #
    # 1. `_enter`: a name may stand for a version that is not in memory. Its task starts.
    # 2. `_reserve`: it has room within the budget, and counts from now on.
    # 3. `_load`: there is no room, or it can't be loaded. No name stands for it any more.
    # 4. `_load`: it can be leased.
    # 5. `_unload`: no name stands for it and it has no lease, or it is evicted. It can't be leased any more; a request
    #    for the same version begins another entry.
    # 6. `_free`: its memory is free.
    # 7. `_enter`: that version is tried again.
    #
    # `distrust` puts another entry in the place of one that is ready, which goes the way of 5 and 6 once it is free.

    def __repr__(self) -> str:
        return f"<Registry { ({each.stored.key: each.state for each in self._entries.values()}) }>"

    def lease(self, name: str, max_wait_seconds: float | None = None) -> "_Lease[M]":
        """The model called `name`, loaded if need be, for as long as the context lasts.

        Where the best version can't be loaded, the next best is tried. A caller that is cancelled while it waits, or
        waits no longer than `max_wait_seconds`, does not stop the load.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has no such model, or not its weights.
            ModelLoadFailed: no version of it could be loaded; the next lease tries again.
            MemoryBudgetExceeded: there is no room for it.
            ModelLoading: `max_wait_seconds` are over; the load goes on.
        """
        return _Lease(self, name, max_wait_seconds)

    async def _take(self, name: str, max_wait_seconds: float | None) -> tuple[Entry[M], M]:
        """What `lease` takes: the entry, to be released, and what it has loaded."""
        failures: dict[str, BaseException] = {}
        while True:
            entry = self._names.get(name) or await self._find(name, max_wait_seconds, failures)
            entry.leases += 1
            try:
                if entry.state != "ready":
                    await self._ready(entry, name, max_wait_seconds)
            except BaseException:
                self._release(entry)
                raise
            if entry.loaded is not None:
                return entry, entry.loaded
            self._release(entry)
            assert entry.failure is not None  # noqa: S101  it is not ready
            failures[entry.candidate.identity] = entry.failure
            if not isinstance(entry.failure, ModelLoadFailed | WeightsUnavailable):
                raise fresh(entry.failure)

    async def pin(self, name: str) -> None:
        """Load the model called `name`, and never evict it, nor what the name stands for later; raises as `lease`."""
        attempt = object()
        self._pinning[attempt] = name
        try:
            async with self.lease(name):
                if attempt in self._pinning:  # else `unpin` was called meanwhile
                    self._pins.add(name)
        finally:
            self._pinning.pop(attempt, None)

    def unpin(self, name: str) -> None:
        """Let the model called `name` be evicted again, whatever still tries to pin it."""
        self._pins.discard(name)
        self._pinning = {attempt: each for attempt, each in self._pinning.items() if each != name}
        if entry := self._names.get(name):
            self._settle(entry)

    async def unload(self, name: str) -> None:
        """Free every version in memory of the model called `name`, or the one it names, once nobody uses them.

        A version that is requested or pinned meanwhile stays. Raises ModelPinned if one is; nothing was done then.
        """
        named = self._names.get(name)
        entries = [e for e in self._entries.values() if e is named or name in {e.stored.id, e.stored.key}]
        if pinned := [each.stored.key for each in entries if self._pinned(each)]:
            raise ModelPinned(f"{', '.join(pinned)} is pinned; unpin it first (DELETE /models/{name}/pin)")
        for entry in entries:
            await asyncio.wait([entry.task])
            if isinstance(entry.failure, AnswersWrong):
                self._entries.pop(entry.candidate.identity, None)  # 7, at the next request
            if not self._pinned(entry):
                entry.reason = "unloaded"
                self._forget_names(entry)
                self._settle(entry)
        while any(e in self._unloading or (e.state == "ready" and not self._names_of(e)) for e in entries):
            self._changed.clear()
            await self._changed.wait()

    async def refresh(self, *, again: bool = False) -> None:
        """Find what each name stands for now, and load what is new beside what serves; then the names pass to it.

        What fails leaves things as they are, and is not tried again until its files change, or `again` says so.
        """
        async with self._one_refresh:
            for name in [*self._names]:
                if (serving := self._names.get(name)) is None:
                    continue
                serving.leases += 1  # what serves is not evicted for its successor
                try:
                    await self._refresh(name, serving, again=again)
                except ServiceError as error:
                    if self._not_refreshed.get(name) != str(error):
                        log.warning("model_not_refreshed", model=name, reason=str(error))
                    self._not_refreshed[name] = str(error)
                else:
                    self._not_refreshed.pop(name, None)
                finally:
                    self._release(serving, used=False)

    @contextmanager
    def held(self, loaded: M) -> Iterator[bool]:
        """Keep `loaded` in memory while the context lasts, which is no use of it; False where it has left already."""
        entry = self._entry_of(loaded)
        if entry is None:
            yield False
            return
        entry.leases += 1
        try:
            yield True
        finally:
            self._release(entry, used=False)

    def distrust(self, loaded: M, reason: str) -> None:
        """The answers of `loaded` are wrong: it is loaded anew, and requests from now on wait for that.

        Those that use it end. Where it happens again soon, that version fails, until its files change, or somebody
        unloads it; a name goes on to its next best version, if it has one.
        """
        if (entry := self._entry_of(loaded)) is None:
            return
        candidate, names = entry.candidate, self._names_of(entry)
        before = self._distrusted.get(candidate.identity, -inf)
        self._distrusted[candidate.identity] = now()
        del self._entries[candidate.identity]
        self._unloading.add(entry)  # its memory still counts
        self._forget_names(entry)
        entry.reason = "wrong"
        if now() - before > WRONG_AGAIN_SECONDS:
            successor = self._enter(candidate)
            successor.distrusted = reason
            self._names |= dict.fromkeys(names, successor)
        else:
            failed = Entry[M](candidate, entry.footprint, now(), state="failed", ended_at=now())
            failed.task = entry.task  # which has ended
            failed.failure = AnswersWrong(
                f"{candidate.stored.key} was loaded anew, and is wrong again: {reason}; the machine's memory or a "
                "library is at fault: restart the service, elsewhere if it stays, or unload the model to try again"
            )
            self._entries[candidate.identity] = failed
        self._settle(entry)

    def distrusted(self, name: str) -> str:
        """What was wrong with the answers of the version that `name` stands for, while that is being loaded anew."""
        entry = self._names.get(name)
        return entry.distrusted if entry and entry.loaded is None else ""

    def named(self, name: str) -> VersionStatus | None:
        """The version that `name` stands for, in memory or on its way there."""
        entry = self._names.get(name)
        return self._status(entry) if entry else None

    def all(self) -> list[VersionStatus]:
        """Every version that is in memory, on its way there, or failed."""
        return [self._status(entry) for entry in self._entries.values()]

    def loaded(self) -> list[M]:
        """Every model that is ready."""
        return [each.loaded for each in self._entries.values() if each.loaded is not None]

    async def close(self) -> None:
        """Give up loads under way and forget everything."""
        await cancel(entry.task for entry in (*self._entries.values(), *self._unloading))
        for state in (self._entries, self._unloading, self._names, self._pins):
            state.clear()

    # Names, and what they stand for.

    async def _find(self, name: str, max_wait_seconds: float | None, failures: dict[str, BaseException]) -> Entry[M]:
        """The best version that `name` may stand for and now does, but none of those in `failures`."""
        found = await self._finder.obtain(name, max_wait_seconds)
        if entry := self._names.get(name):  # found for another caller meanwhile
            return entry
        left = [each for each in found if not (each.identity in failures or self._failed(each))]
        if failures and not left:
            raise fresh(next(iter(failures.values())))
        best = (left or found)[0]
        known = self._entries.get(best.identity)
        if known and isinstance(known.failure, AnswersWrong) and known.candidate.mark == best.mark:
            raise fresh(known.failure)
        if max_wait_seconds is not None and known and known.failure and now() - known.ended_at < FAILURE_SECONDS:
            raise fresh(known.failure)
        entry = self._names[name] = self._enter(best)
        self._changed.set()
        return entry

    def _failed(self, candidate: Candidate) -> bool:
        """Whether it could not be loaded, and its files have not changed since; or it has just been unavailable."""
        entry = self._entries.get(candidate.identity)
        if entry is None or entry.candidate.mark != candidate.mark:
            return False
        lately = now() - entry.ended_at < FAILURE_SECONDS
        return isinstance(entry.failure, ModelLoadFailed) or (lately and isinstance(entry.failure, WeightsUnavailable))

    async def _refresh(self, name: str, serving: Entry[M], *, again: bool) -> None:
        """Let `name` stand for the best version that can be loaded; for none, if the name is gone but not its model."""
        try:
            found = await self._finder.find(name)
        except ModelNotFound:
            if serving.stored.id == name:
                raise
            await self._finder.find(serving.stored.id)
            if self._names.get(name) is serving:
                log.info("name_gone", name=name, stood_for=serving.stored.key)
                del self._names[name]
            return
        for candidate in found:
            if candidate.identity == serving.candidate.identity:
                return
            if self._failed(candidate) and not again:
                continue
            change = {"name": name, "version": candidate.stored.key}
            entry = self._enter(candidate)
            entry.leases += 1
            try:
                await shared(entry.task)
                if entry.failure is None and self._names.get(name) is serving:
                    self._names[name] = entry
                    log.info("model_replaced", **change, served_before=serving.stored.key)
            finally:
                self._release(entry, used=False)
            if entry.failure is None:
                return
            log.warning("model_not_replaced", **change, still_serves=serving.stored.key, reason=str(entry.failure))

    def _entry_of(self, loaded: M) -> Entry[M] | None:
        return next((each for each in self._entries.values() if each.loaded is loaded), None)

    def _names_of(self, entry: Entry[M]) -> list[str]:
        return [name for name, each in self._names.items() if each is entry]

    def _forget_names(self, entry: Entry[M]) -> None:
        self._names = {name: each for name, each in self._names.items() if each is not entry}

    def _pinned(self, entry: Entry[M]) -> bool:
        return not self._pins.isdisjoint(self._names_of(entry))

    # Entries: the transitions.

    def _enter(self, candidate: Candidate) -> Entry[M]:
        """The entry of `candidate`, which is on its way into memory if it was not there."""
        entry = self._entries.get(candidate.identity)
        if entry is None or entry.failure:
            for other in [*self._entries.values()]:
                if other.failure and other.stored.key == candidate.stored.key:
                    del self._entries[other.candidate.identity]  # 7
            entry = Entry[M](candidate, self._loader.footprint(candidate.stored), now())
            self._entries[candidate.identity] = entry
            entry.task = asyncio.create_task(self._load(entry))  # 1
        return entry

    async def _load(self, entry: Entry[M]) -> None:
        try:
            await self._reserve(entry)
            entry.loaded = await self._loader.load(entry.stored, self._free_memory)
        except BaseException as error:
            entry.failure = fresh(error)
            entry.state = "failed"  # 3
            self._forget_names(entry)
            if not isinstance(error, Exception):
                raise
        else:
            entry.footprint = self._loader.footprint(entry.stored)
            entry.state = "ready"  # 4
        entry.ended_at = entry.used_at = now()
        entry.inflation = self._inflation
        self._settle(entry)

    async def _ready(self, entry: Entry[M], name: str, max_wait_seconds: float | None) -> None:
        """Return when its load has ended; raises ModelLoading where that takes longer."""
        try:
            await shared(entry.task, max_wait_seconds)
        except TimeoutError:
            began = [e for e in self._entries.values() if e.ended_at == inf and e.began_at <= entry.began_at]
            elapsed = now() - min((each.began_at for each in began), default=now())
            seconds = max(0.0, sum(each.footprint.seconds for each in began) - elapsed)  # loads take turns
            raise ModelLoading(
                f"{name} is being loaded, which takes about {seconds:.1f} s more; ask again then, or wait for it: "
                "without 'Prefer: respond-async', and with PVT_COLD=wait",
                seconds,
            ) from None

    def _release(self, entry: Entry[M], *, used: bool = True) -> None:
        entry.leases -= 1
        if used:
            entry.used_at, entry.inflation = now(), self._inflation
        if not entry.leases:
            self._settle(entry)

    def _settle(self, entry: Entry[M]) -> None:
        """Something about `entry` has changed: unload it if nothing keeps it, then what is too much beside it."""
        if entry.state == "ready" and not entry.leases and not self._names_of(entry):
            self._unload(entry, entry.reason)
        self._make_room(0)  # loads may have turned out larger than was thought
        self._changed.set()

    def _unload(self, entry: Entry[M], reason: UnloadReason) -> "asyncio.Task[None]":
        entry.state = "unloading"  # 5
        if self._entries.get(entry.candidate.identity) is entry:  # else another one has taken its place
            del self._entries[entry.candidate.identity]
        self._unloading.add(entry)
        self._forget_names(entry)
        log.info("model_unloading", model=entry.stored.id, version=entry.stored.version, reason=reason)
        entry.task = asyncio.create_task(self._free(entry, reason))
        return entry.task

    async def _free(self, entry: Entry[M], reason: UnloadReason) -> None:
        assert entry.loaded is not None  # noqa: S101  it was ready
        only, entry.loaded = [entry.loaded], None
        try:
            await self._loader.unload(only, reason)
        finally:
            self._unloading.discard(entry)  # 6
            self._settle(entry)

    # The budget.

    async def _reserve(self, entry: Entry[M]) -> None:
        """Evict until `entry` fits into the budget, or wait a while for what is in use."""
        if full := await self._until_room(lambda: self._make_room(entry.footprint.bytes)):
            limit, seconds = self._budget.bytes or 0, full.until - now()
            raise no_room(entry.stored.key, entry.footprint, limit, self._memory(), seconds)
        entry.state = "loading"  # 2

    async def _free_memory(self, missing: Callable[[], int]) -> None:
        """Evict until nothing is `missing`, or wait a while for what is in use, also by requests."""

        def evict() -> "Full | list[asyncio.Task[None]]":
            needed = missing()
            return self._evict(needed, used_bytes(self._memory())) if needed else []

        await self._until_room(evict, look_again_seconds=_LOOK_AGAIN_SECONDS)

    async def _until_room(
        self, decide: Callable[[], "Full | list[asyncio.Task[None]]"], look_again_seconds: float = inf
    ) -> Full | None:
        """Until `decide` has nothing to evict, or waiting is of no use: what is full then."""
        give_up = now() + self._budget.max_wait_seconds
        while outcome := decide():
            if not isinstance(outcome, Full):
                await asyncio.wait(outcome)
            elif outcome.until < give_up or (look_again_seconds < inf and now() < give_up):
                wake_at = outcome.until if outcome.until > now() else give_up
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(min(wake_at, give_up, now() + look_again_seconds)):
                        await self._changed.wait()
            else:
                return outcome
        return None

    def _make_room(self, needed: int) -> "Full | list[asyncio.Task[None]]":
        """Evict until there is room for so many bytes more; what frees it, or that it is full."""
        return [] if self._budget.bytes is None else self._evict(needed, self._budget.bytes)

    def _evict(self, needed: int, budget: int) -> "Full | list[asyncio.Task[None]]":
        decision = make_room(self._memory(), needed, budget, now(), self._inflation)
        if isinstance(decision, Full):
            return decision
        self._inflation = decision.inflation
        return [self._unload(self._entries[key], "budget") for key in decision.keys]

    def _memory(self) -> list[MemoryUse]:
        time, stay = now(), self._budget.min_residency_seconds
        return [
            MemoryUse(
                key=each.candidate.identity,
                name=each.stored.key,
                bytes=self._bytes(each),
                credit=credit(each.inflation, each.footprint.seconds, self._bytes(each)),
                used_at=each.used_at,
                evictable_at=min(each.ended_at, time) + stay,
                kept_by=(
                    "unloading" if each.state == "unloading"
                    else "pinned" if self._pinned(each)
                    else "loading" if each.state == "loading"
                    else "in use" if each.leases
                    else ""
                ),
            )
            for each in (*self._entries.values(), *self._unloading)
            if each.state in {"loading", "ready", "unloading"}
        ]  # fmt: skip

    def _bytes(self, entry: Entry[M]) -> int:
        """What it takes, as measured once it is loaded."""
        return entry.footprint.bytes if entry.loaded is None else self._loader.memory_bytes(entry.loaded)

    def _status(self, entry: Entry[M]) -> VersionStatus:
        ready = entry.loaded is not None
        return VersionStatus(
            stored=entry.stored,
            state="failed" if entry.failure else "ready" if ready else "loading",
            failure=entry.failure and fresh(entry.failure),
            leases=entry.leases,
            pinned=self._pinned(entry),
            idle_seconds=(0.0 if entry.leases else now() - entry.used_at) if ready else None,
            memory_bytes=self._bytes(entry) if ready else None,
        )


class _Lease(Generic[M]):
    """See `Registry.lease`. A class rather than a generator, which costs each request several times as much."""

    __slots__ = ("_entry", "_max_wait_seconds", "_name", "_registry")

    def __init__(self, registry: Registry[M], name: str, max_wait_seconds: float | None) -> None:
        self._registry = registry
        self._name = name
        self._max_wait_seconds = max_wait_seconds
        # Mutable state: what is leased, inside the context.
        self._entry: Entry[M] | None = None

    async def __aenter__(self) -> M:
        self._entry, loaded = await self._registry._take(self._name, self._max_wait_seconds)  # noqa: SLF001  of this module
        return loaded

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entry, self._entry = self._entry, None  # whoever keeps the context keeps no model
        assert entry is not None  # noqa: S101  it was entered
        self._registry._release(entry)  # noqa: SLF001


def now() -> float:
    """Seconds on the event loop's clock."""
    return asyncio.get_running_loop().time()
