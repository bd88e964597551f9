"""The models that are in memory or on their way: loaded by the first request, once for all who wait."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from service.errors import ServiceError
from service.store import StoredModel

M = TypeVar("M")

State = Literal["available", "loading", "ready", "failed"]


@dataclass(eq=False, slots=True)
class _Entry(Generic[M]):
    task: asyncio.Task[M]
    leases: int = 0


@dataclass(frozen=True, slots=True)
class Status(Generic[M]):
    """Where a model stands: `loaded` when ready, `failure` when failed."""

    state: State
    loaded: M | None = None
    failure: BaseException | None = None
    leases: int = 0


class Registry(Generic[M]):
    """Leases of loaded models. Generic: what a loaded model is, only `load` knows."""

    def __init__(
        self, find: Callable[[str], Awaitable[StoredModel]], load: Callable[[StoredModel], Coroutine[None, None, M]]
    ) -> None:
        self._find = find
        self._load = load
        # Mutable state: a task per model that was ever asked for, and the names under which callers asked.
        self._entries: dict[str, _Entry[M]] = {}
        self._ids: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Registry { ({id_: self.status(id_).state for id_ in self._entries}) }>"

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[M]:
        """The model called `name`, loaded if need be, for as long as the context lasts.

        A caller that is cancelled while it waits leaves the load to the others.

        Raises:
            ModelNotFound: the store has no such model.
            WeightsUnavailable: its weights are not in the store.
            ModelLoadFailed: loading failed; the next lease tries again.
        """
        entry = await self._entry(name)
        entry.leases += 1
        try:
            yield await self._loaded(entry)
        finally:
            entry.leases -= 1

    def status(self, id_: str) -> Status[M]:
        """Where the model with this id stands."""
        entry = self._entries.get(id_)
        if entry is None:
            return Status("available")
        if not entry.task.done():
            return Status("loading", leases=entry.leases)
        if failure := _failure(entry.task):
            return Status("failed", failure=failure)
        return Status("ready", loaded=entry.task.result(), leases=entry.leases)

    def loaded(self) -> list[M]:
        """Every model that is ready."""
        return [status.loaded for id_ in self._entries if (status := self.status(id_)).loaded is not None]

    async def close(self) -> None:
        """Give up loads under way and forget everything."""
        tasks = [entry.task for entry in self._entries.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._entries.clear()
        self._ids.clear()

    @staticmethod
    async def _loaded(entry: _Entry[M]) -> M:
        try:
            return await asyncio.shield(entry.task)
        except ServiceError as error:
            # A copy: the task keeps its own, and on that the frames, and so the pictures, of all who waited would stay.
            raise copy(error) from None

    def find_loaded(self, name: str) -> M | None:
        """The model that answers to `name` now, if one does."""
        return self.status(self._ids.get(name, name)).loaded

    async def _entry(self, name: str) -> _Entry[M]:
        known = self._entries.get(self._ids.get(name, ""))
        if known and not _failure(known.task):
            return known
        stored = await self._find(name)
        self._ids[name] = stored.id
        entry = self._entries.get(stored.id)  # looked up after the await: another caller may have begun meanwhile
        if entry is None or _failure(entry.task):
            entry = self._entries[stored.id] = _Entry(asyncio.create_task(self._load(stored)))
            entry.task.add_done_callback(_failure)  # retrieved here, should every caller have gone
        return entry


def _failure(task: asyncio.Task[M]) -> BaseException | None:
    if not task.done():
        return None
    return ServiceError("loading was cancelled") if task.cancelled() else task.exception()
