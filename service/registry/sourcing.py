"""What the registry loads from: the store's versions, made into models that run, and freed again."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from hashlib import sha256
from typing import TypeVar

from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.pipeline import Pipeline
from service.registry.entries import Candidate, Reason
from service.registry.footprints import Footprint
from service.registry.loading import Loading
from service.registry.residents import Resident
from service.registry.supply import Supply
from service.store.stored import StoredModel

T = TypeVar("T")


class Sourcing:
    """A `holdings.Source`. Close it when all it loaded is freed, or not used any more."""

    def __init__(
        self, options: EngineOptions, metrics: EngineMetrics, pipeline: Pipeline, supply: Supply, loading: Loading
    ) -> None:
        self._options = options
        self._metrics = metrics
        self._pipeline = pipeline
        self._supply = supply
        self._loading = loading
        # Mutable state: for each model what is being added to it, though it answers already.
        self._widening: dict[Resident, asyncio.Task[None]] = {}

    async def candidates(self, name: str) -> Sequence[Candidate]:
        """See `Source.candidates`."""
        versions = await self._supply.candidates(name)
        return await self._supply.thread.run(lambda: [_candidate(version) for version in versions])

    async def load(self, stored: StoredModel) -> Resident:
        """See `Source.load`."""
        async with self._supply.fetched(stored) as local:
            executable = await self._loading.load(local)
        compile_ = partial(self._extend, executable.stored)
        resident = Resident(executable, self._pipeline, compile_, max_others=self._options.sizes_per_model)
        self._widening[resident] = asyncio.create_task(self._better(resident))
        self._widening[resident].add_done_callback(lambda _: self._widening.pop(resident, None))
        return resident

    async def _better(self, resident: Resident) -> None:
        await self._loading.widen(resident.executable)
        await self._loading.improve(resident.executable, resident.replan)

    async def _extend(self, stored: StoredModel, make: Callable[[], T]) -> T:
        async with self._supply.fetched(stored):  # `make` may read the weights again
            return await self._loading.extend(stored, make)

    async def unload(self, only: list[Resident]) -> None:
        """See `Source.unload`."""
        await self._end_widening(only[0])
        await only[0].close()
        await self._loading.free(only[0].executable.stored, only)

    async def _end_widening(self, resident: Resident) -> None:
        # Apart from `unload`, which would keep the task, and with its cancellation all frames that lead to the model.
        if widening := self._widening.pop(resident, None):
            await _given_up(widening)

    def size(self, loaded: Resident) -> int:
        """See `Source.size`."""
        return loaded.memory_bytes

    def footprint(self, stored: StoredModel) -> Footprint:
        """See `Source.footprint`."""
        return self._loading.footprint(stored)

    def left(self, reason: Reason) -> None:
        """See `Source.left`."""
        self._metrics.evictions.labels(reason).inc()

    async def close(self) -> None:
        """Give up what is being added to models."""
        await asyncio.gather(*map(_given_up, self._widening.values()))


def _given_up(task: asyncio.Task[None]) -> Coroutine[None, None, None]:
    task.cancel()

    async def ended() -> None:
        await asyncio.wait([task])

    return ended()


def _candidate(stored: StoredModel) -> Candidate:
    """A card has the digests of all its files in it, so the same card is the same model."""
    card = sha256(stored.card.model_dump_json().encode()).hexdigest()[:16] if stored.card else ""
    return Candidate(stored, f"{stored.key}#{card}", _mark(stored))


def _mark(stored: StoredModel) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of its files; nothing, where it has none on this machine."""
    try:
        found = [(path.name, path.stat()) for path in sorted(stored.folder.iterdir())]
    except OSError:
        return ()
    return tuple((name, there.st_size, there.st_mtime_ns) for name, there in found)
