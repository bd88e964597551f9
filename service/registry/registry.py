"""The models that are in memory or on their way: loaded once for all who wait, replaced while they serve."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.errors import ModelLoadFailed, ModelLoading, ModelPinned, ServiceError, WeightsUnavailable
from service.eviction import Budget
from service.registry.entries import Candidate, Entry, Status
from service.registry.holdings import Holdings, Source, now
from service.registry.name_table import NameTable
from service.registry.reload import Reload
from service.store.stored import StoredModel

M = TypeVar("M")

FAILURE_SECONDS = 10.0  # how long a load that failed is what those are told who would not wait for it


@dataclass(eq=False, slots=True)
class _Arrival(Generic[M]):
    """A name on its way to a model that is ready; it holds that model until all who wait have it."""

    name: str
    turn: int
    task: asyncio.Task[Entry[M]] = field(init=False)
    # Mutable state: what is being loaded, how many wait, whether its hold has been given up.
    entry: Entry[M] | None = None
    waiting: int = 0
    over: bool = False


class Registry(Generic[M]):
    """Leases of loaded models, by any of their names. Its methods belong to one event loop."""

    def __init__(self, source: Source[M], budget: Budget = Budget()) -> None:  # noqa: B008  it is frozen
        self._source = source
        self._holdings = Holdings[M](source, budget, self._forget)
        self._names = NameTable[M](self._holdings.settle)
        self._reload = Reload(source, self._names, self._holdings)
        # Mutable state: the names on their way, and what went wrong with which lately.
        self._arrivals: dict[str, _Arrival[M]] = {}
        self._failures: dict[str, tuple[float, ServiceError]] = {}

    def __repr__(self) -> str:
        return f"<Registry { ({stored.key: status.state for stored, status in self.all()}) }>"

    @asynccontextmanager
    async def lease(self, name: str, patience_seconds: float | None = None) -> AsyncIterator[M]:
        """The model called `name`, loaded if need be, for as long as the context lasts.

        A caller that is cancelled while it waits, or waits no longer than `patience_seconds`, does not stop the load.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has no such model, or not its weights.
            ModelLoadFailed: no version of it could be loaded; the next lease tries again.
            MemoryBudgetExceeded: there is no room for it.
            ModelLoading: patience ended; the load goes on.
        """
        entry = self._taken(name) or await self._arrive(name, patience_seconds)
        try:
            assert entry.loaded is not None  # noqa: S101  it is ready, and held
            yield entry.loaded
        finally:
            self._holdings.release(entry)

    async def pin(self, name: str) -> None:
        """Load the model called `name`, and never evict it, nor whatever that name stands for later.

        Raises:
            ServiceError: as `lease`; it is not pinned then.
        """
        with self._names.pinning(name):
            async with self.lease(name):
                pass

    def unpin(self, name: str) -> None:
        """Let the model called `name` be evicted again."""
        self._names.unpin(name)

    async def unload(self, name: str) -> None:
        """Free every version in memory of the model called `name`, or the one it names, once nobody uses them.

        Whoever asks for one meanwhile, or pins it, keeps it.

        Raises:
            ModelPinned: one of them is pinned; nothing was done.
        """
        named = self._names.get(name)
        entries = [each for each in self._holdings if name in {each.stored.id, each.stored.key} or each is named]
        if pinned := [each.stored.key for each in entries if each.pinned]:
            raise ModelPinned(f"{', '.join(pinned)} is pinned; unpin it first (DELETE /models/{name}/pin)")
        for entry in entries:
            with suppress(ServiceError):
                await self._holdings.loaded(entry)
            if entry.pinned:  # meanwhile
                continue
            entry.reason = "unloaded"
            self._names.forget(entry)
            self._holdings.settle(entry)
        while any(self._holdings.present(entry) and not entry.names for entry in entries):
            await self._holdings.changed()

    async def refresh(self, *, again: bool = False) -> None:
        """Look at what each name stands for now, and load what is new beside what serves; names then pass to it.

        What fails leaves things as they are, and is not tried again until its files change, or `again` says so.
        """
        await self._reload.run(again=again)

    def named(self, name: str) -> tuple[StoredModel, Status[M]] | None:
        """The model in memory that `name` stands for."""
        entry = self._names.get(name)
        return (entry.stored, entry.status(now())) if entry else None

    def all(self) -> list[tuple[StoredModel, Status[M]]]:
        """Every version that is in memory, on its way there, or failed to get there."""
        return [(each.stored, each.status(now())) for each in self._holdings]

    def loaded(self) -> list[M]:
        """Every model that is ready."""
        return [status.loaded for _, status in self.all() if status.loaded is not None]

    async def close(self) -> None:
        """Give up loads under way and forget everything."""
        arrivals = [arrival.task for arrival in self._arrivals.values()]
        for task in arrivals:
            task.cancel()
        await self._holdings.close()
        await asyncio.gather(*arrivals, return_exceptions=True)
        self._names.clear()

    def _forget(self, entry: Entry[M]) -> None:
        self._names.forget(entry)

    def _taken(self, name: str) -> Entry[M] | None:
        entry = self._names.get(name)
        if entry is None or not entry.ready:
            return None
        self._holdings.hold(entry)
        return entry

    async def _arrive(self, name: str, patience: float | None) -> Entry[M]:
        """The entry that `name` stands for, held, once it is ready."""
        arrival = self._arrivals.get(name)
        if arrival is None:
            if patience is not None:
                self._tell_failure(name)
            turn = self._names.turn()
            candidates = self._worth_trying(await self._source.candidates(name))
            if entry := self._taken(name) or self._there(name, candidates[0], turn):
                return entry
            arrival = self._arrivals.get(name) or self._set_out(_Arrival(name, turn), candidates)
        arrival.waiting += 1
        try:
            done, _ = await asyncio.wait([arrival.task], timeout=patience)
            if not done:
                raise self._not_yet(arrival)
            try:
                entry = arrival.task.result()
            except ServiceError as error:
                raise copy(error) from None  # see Holdings.loaded
            self._holdings.hold(entry)
            return entry
        finally:
            arrival.waiting -= 1
            self._let_go(arrival)

    def _there(self, name: str, candidate: Candidate, turn: int) -> Entry[M] | None:
        """The entry of `candidate`, held, if it is ready: it was only the name that was not known."""
        entry = self._holdings.get(candidate.identity)
        if entry is None or not entry.ready:
            return None
        self._holdings.hold(entry)
        self._names.point(name, entry, turn)
        return entry

    def _set_out(self, arrival: _Arrival[M], candidates: Sequence[Candidate]) -> _Arrival[M]:
        def arrived(task: asyncio.Task[Entry[M]]) -> None:
            del self._arrivals[arrival.name]
            self._failures.pop(arrival.name, None)
            if not task.cancelled() and isinstance(error := task.exception(), ServiceError):
                self._failures[arrival.name] = (now(), error)
            self._let_go(arrival)

        arrival.task = asyncio.create_task(self._first_of(arrival, candidates))
        arrival.task.add_done_callback(arrived)
        self._arrivals[arrival.name] = arrival
        return arrival

    def _let_go(self, arrival: _Arrival[M]) -> None:
        """Give up the arrival's own hold, once it is over and nobody waits for it any more."""
        if arrival.waiting or arrival.over or not arrival.task.done():
            return
        arrival.over = True
        if not arrival.task.cancelled() and not arrival.task.exception():
            self._holdings.release(arrival.task.result())

    async def _first_of(self, arrival: _Arrival[M], candidates: Sequence[Candidate]) -> Entry[M]:
        """The first of `candidates` that can be loaded, held."""
        failures: list[ServiceError] = []
        for candidate in candidates:
            entry = arrival.entry = self._holdings.begin(candidate)
            self._holdings.hold(entry)
            try:
                await self._holdings.loaded(entry)
            except (ModelLoadFailed, WeightsUnavailable) as error:
                self._holdings.release(entry)
                failures.append(error)
            except BaseException:
                self._holdings.release(entry)
                raise
            else:
                self._names.point(arrival.name, entry, arrival.turn)
                return entry
        raise failures[0]

    def _worth_trying(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """All but those that failed; all, where every one did."""
        return [each for each in candidates if not self._holdings.failed(each)] or candidates

    def _tell_failure(self, name: str) -> None:
        at, error = self._failures.get(name, (0.0, None))
        if error and now() - at < FAILURE_SECONDS:
            raise copy(error)

    def _not_yet(self, arrival: _Arrival[M]) -> ModelLoading:
        seconds = self._holdings.loading_seconds(arrival.entry) if arrival.entry else 0.0
        return ModelLoading(
            f"{arrival.name} is being loaded, which takes about {seconds:.1f} s more; ask again then, or wait for it: "
            "without 'Prefer: respond-async', and with PVT_COLD=wait",
            seconds,
        )
