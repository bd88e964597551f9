"""Where models come from: the store, read on a thread of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from service.options import EngineOptions
from service.remote import open_store
from service.store import StoredModel
from service.workers import Workers

FETCHES = 4  # at a time; they wait for one another's room in the cache, but not for one that has its files


class Supply:
    """Knows every model that could be loaded, and brings its bytes onto this machine. It lives until it is closed."""

    def __init__(self, options: EngineOptions) -> None:
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

    async def find(self, name: str) -> StoredModel:
        """The model called `name`.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has none.
        """
        return await self.thread.run(self._store.find, name)

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
