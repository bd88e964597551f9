"""Where models come from: the store, read on a thread of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from service.machine.workers import Workers
from service.options import EngineOptions
from service.store.remote import open_store
from service.store.store import Contents, StoredModel

FETCHES = 4  # at a time; they wait for one another's room in the cache, but not for one that has its files


class Supply:
    """Knows every model that could be loaded, and brings its bytes onto this machine. It lives until it is closed.

    `folder` is where to watch for changes, if that can be watched.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.folder: Path | None = options.model_store
        self._store = open_store(options.model_store, options.remote_store)
        self.thread = Workers("store", 1)
        # Not the store's thread: downloads take minutes, and are no stall.
        self._fetching = Workers("fetch", FETCHES)

    def close(self) -> None:
        """Give up what is under way."""
        self._store.close()
        for thread in (self.thread, self._fetching):
            thread.close(wait=False)

    async def models(self) -> list[StoredModel]:
        """Every model there is.

        Raises:
            WeightsUnavailable: the store can't be read.
        """
        return await self.thread.run(self._store.models)

    async def contents(self) -> Contents:
        """Every version of every model, and the aliases.

        Raises:
            WeightsUnavailable: the store can't be read.
        """
        return await self.thread.run(self._store.contents)

    async def candidates(self, name: str) -> list[StoredModel]:
        """The versions that may answer to `name`, the best first; at least one.

        Raises:
            ModelNotFound, WeightsUnavailable, AliasesInvalid: there is none.
        """
        return await self.thread.run(self._store.candidates, name)

    async def aliases(self) -> dict[str, str]:
        """Every alias, and what it stands for.

        Raises:
            AliasesInvalid: the aliases can't be read.
        """
        return dict(await self.thread.run(self._store.aliases))

    async def set_alias(self, name: str, target: str) -> None:
        """Let `name` stand for `target` in the store; see `Store.set_alias`."""
        await self.thread.run(self._store.set_alias, name, target)

    async def remove_alias(self, name: str) -> None:
        """Let `name` stand for nothing in the store; see `Store.remove_alias`."""
        await self.thread.run(self._store.remove_alias, name)

    @asynccontextmanager
    async def fetched(self, stored: StoredModel) -> AsyncIterator[StoredModel]:
        """The same model with all its files in a folder of this machine, for as long as the context lasts.

        Raises:
            WeightsUnavailable, ModelLoadFailed: they can't be had, or are not what they should be.
        """
        held = ExitStack()
        fetching = asyncio.ensure_future(self._fetching.run(held.enter_context, self._store.holding(stored)))

        def let_go(done: "asyncio.Future[StoredModel]") -> None:
            held.close()
            _ = done.cancelled() or done.exception()  # retrieved here, should the caller have gone

        try:
            yield await asyncio.shield(fetching)
        finally:
            fetching.add_done_callback(let_go)
