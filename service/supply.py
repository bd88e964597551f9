"""Where models come from: the store, read on a thread of its own."""

from pathlib import Path

from service.options import EngineOptions
from service.store import Contents, Store, StoredModel
from service.workers import Workers


class Supply:
    """Knows every model that could be loaded, and brings its bytes onto this machine. It lives until it is closed.

    `folder` is where to watch for changes, if that can be watched.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.folder: Path | None = options.model_store
        self._store = Store(options.model_store)
        self.thread = Workers("store", 1)

    def close(self) -> None:
        """Give up what is under way."""
        self.thread.close(wait=False)

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

    async def fetch(self, stored: StoredModel) -> StoredModel:
        """The same model with all its files in a folder of this machine."""
        return stored
