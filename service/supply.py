"""Where models come from: the store, read on a thread of its own."""

from service.options import EngineOptions
from service.store import Store, StoredModel
from service.workers import Workers


class Supply:
    """Knows every model that could be loaded, and brings its bytes onto this machine. It lives until it is closed."""

    def __init__(self, options: EngineOptions) -> None:
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

    async def find(self, name: str) -> StoredModel:
        """The model called `name`.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has none.
        """
        return await self.thread.run(self._store.find, name)

    async def fetch(self, stored: StoredModel) -> StoredModel:
        """The same model with all its files in a folder of this machine."""
        return stored
