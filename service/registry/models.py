"""The models: which there are, which are in memory, and the loading of those that are asked for."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import structlog

from service.acquisition.on_demand import OnDemand, RemoteModel
from service.errors import ServiceError, WeightsUnavailable
from service.machine.workers import Workers
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.pipeline import Pipeline
from service.registry.listing import Listing, ModelStatus
from service.registry.loading import Loading
from service.registry.registry import Registry
from service.registry.residents import Resident
from service.registry.sourcing import Sourcing
from service.registry.supply import Supply
from service.registry.watching import Watch

log = structlog.get_logger(component="models")

STORE_SECONDS = 2.0  # a store on a network that takes longer to list its cards is no good to serve from
PRELOAD_AGAIN_SECONDS = 15.0


class Models:
    """Use as `start`, then `lease`, then `close`. Its methods belong to one event loop."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics, pipeline: Pipeline) -> None:
        self._options = options
        self._metrics = metrics
        self._pipeline = pipeline
        self._supply = Supply(options)
        self._loading = Loading(options, metrics)
        self._sourcing = Sourcing(options, metrics, pipeline, self._supply, self._loading)
        self._registry = Registry[Resident](self._sourcing, options.budget)
        self._on_demand = OnDemand(options, self._supply.candidates)
        self._listing = Listing(options.default_model, self._supply, self._registry)
        # Mutable state: work that no request waits for, and what is to be loaded before the service is ready.
        self._tasks: set[asyncio.Task[None]] = set()
        self._preloading = {*options.preload, *options.pinned}

    async def start(self) -> None:
        """Begin to load what is to be preloaded, and say so if the default model can't be had."""
        for name in {self._options.default_model} - self._preloading:
            for reason in await self._unready(name):
                log.warning("default_model_unavailable", reason=reason)
        for name in self._options.pinned:
            self._background(self._preload(name, self.pin))
        for name in self._options.preload:
            self._background(self._preload(name, self.load))
        if self._options.reload_seconds:
            watch = Watch(self._supply.folder, self._options.reload_seconds, self.refresh)
            self._background(watch.run())

    async def stop(self) -> None:
        """Load no more and forget what is loaded; no request may be under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._registry.close()
        await self._sourcing.close()

    def close(self) -> None:
        """End the threads, once nothing runs a model any more."""
        self._on_demand.close()
        self._loading.close()
        self._supply.close()

    def lease(self, name: str | None, patience_seconds: float | None = None) -> AbstractAsyncContextManager[Resident]:
        """The model called `name`, or the default one, in memory for as long as the context lasts.

        `patience_seconds` is how long to wait for it to be loaded; None leaves that to the options.

        Raises:
            ModelNotFound, WeightsUnavailable, ModelLoadFailed, MemoryBudgetExceeded: it can't be had.
            ModelLoading: patience ended.
        """
        if patience_seconds is None and self._options.cold == "refuse":
            patience_seconds = 0.0
        name = self._options.default_model if name is None else name
        if self._on_demand.enabled and not self._registry.named(name):
            return self._pulled(name, patience_seconds)
        return self._registry.lease(name, patience_seconds)

    def loaded(self) -> list[Resident]:
        """Every model that is in memory."""
        return self._registry.loaded()

    async def all(self) -> list[ModelStatus]:
        """Every model of the store, and every other that is loaded.

        Raises:
            WeightsUnavailable: the store can't be read, and nothing is loaded.
        """
        return await self._listing.all()

    async def one(self, name: str) -> ModelStatus:
        """The model called `name`.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has none.
        """
        return await self._listing.one(name)

    async def described(self, name: str) -> ModelStatus | RemoteModel:
        """The model called `name`, be it that it could only be pulled.

        Raises:
            ModelNotFound, WeightsUnavailable: there is none.
        """
        try:
            return await self.one(name)
        except WeightsUnavailable:
            if remote := self._on_demand.one(name):
                return remote
            raise

    def remote(self, found: Sequence[ModelStatus]) -> list[RemoteModel]:
        """The published models that are not among those `found` in the store."""
        return self._on_demand.remote({model.stored.id for model in found})

    async def load(self, name: str, patience_seconds: float | None = None) -> None:
        """Load the model called `name`, if it is not there.

        Raises:
            ServiceError: as `lease`.
        """
        async with self._pulled(name, patience_seconds):
            pass

    async def unload(self, name: str) -> None:
        """Free the model called `name` once nobody uses it, unless somebody asks for it meanwhile.

        Raises:
            ModelPinned: it is pinned.
            ModelNotFound, WeightsUnavailable: there is none.
        """
        await self.one(name)
        await self._registry.unload(name)

    async def pin(self, name: str) -> None:
        """Load the model called `name`, and never evict it.

        Raises:
            ServiceError: as `lease`.
        """
        await self._on_demand.ensure(name)
        await self._registry.pin(name)

    def unpin(self, name: str) -> None:
        """Let the model called `name` be evicted again."""
        self._registry.unpin(name)

    async def refresh(self, *, again: bool = False) -> None:
        """Take over what is new in the store; `again` tries what failed before, too. Returns when all that is done."""
        await self._registry.refresh(again=again)

    async def aliases(self) -> dict[str, str]:
        """Every alias, and what it stands for.

        Raises:
            AliasesInvalid: the aliases can't be read.
        """
        return await self._supply.aliases()

    async def set_alias(self, name: str, target: str) -> None:
        """Let `name` stand for `target`, in the store, and here as soon as that is loaded.

        Raises:
            InvalidRequest, ModelNotFound, ModelLoadFailed, AliasesInvalid, StoreNotWritable: nothing was changed.
        """
        await self._supply.set_alias(name, target)
        self._background(self.refresh())

    async def remove_alias(self, name: str) -> None:
        """Let `name` stand for nothing.

        Raises:
            ModelNotFound, AliasesInvalid, StoreNotWritable: nothing was changed.
        """
        await self._supply.remove_alias(name)
        await self.refresh()

    async def unready(self) -> list[str]:
        """Why the default model, or what is preloaded, would not answer; empty when they do, or would if asked."""
        reasons: list[str] = []
        try:
            async with asyncio.timeout(STORE_SECONDS):
                for name in dict.fromkeys((self._options.default_model, *self._options.preload, *self._options.pinned)):
                    reasons.extend(await self._unready(name))
        except TimeoutError:
            reasons.append(f"the model store has not answered for {STORE_SECONDS:.0f} s")
        return reasons

    def stalled(self, *others: Workers) -> list[str]:
        """A reason for each thread, the pipeline's, the store's and `others`, that does not move.

        And one for a GPU that failed, while it ran a batch or while a model was loaded.
        """
        stalled = self._pipeline.stalled(self._supply.thread, *others)
        return [*stalled, *{self._loading.failed_device} - {"", *stalled}]

    def collect_metrics(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.models_loaded.set(len(self.loaded()))
        sizes: dict[str, int] = {}
        for resident in self.loaded():
            sizes[resident.id] = sizes.get(resident.id, 0) + resident.memory_bytes
        self._metrics.tell_memory(sizes)

    @asynccontextmanager
    async def _pulled(self, name: str, patience_seconds: float | None) -> AsyncIterator[Resident]:
        await self._on_demand.ensure(name, patience_seconds)
        async with self._registry.lease(name, patience_seconds) as resident:
            yield resident

    async def _preload(self, name: str, load: Callable[[str], Awaitable[None]]) -> None:
        """Load `name`; what fails is tried again, since it keeps the service from being ready."""
        while True:
            try:
                await load(name)
            except ServiceError as error:
                log.warning("preload_failed", model=name, reason=str(error), again_in_seconds=PRELOAD_AGAIN_SECONDS)
            except Exception:
                log.exception("preload_failed", model=name, again_in_seconds=PRELOAD_AGAIN_SECONDS)
            else:
                self._preloading.discard(name)
                return
            await asyncio.sleep(PRELOAD_AGAIN_SECONDS)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unready(self, name: str) -> list[str]:
        try:
            model = await self.one(name)
        except ServiceError as error:
            asked = name not in self._preloading and isinstance(error, WeightsUnavailable) and self._on_demand.can(name)
            return [] if asked else [f"{name}: {error}"]
        if failure := model.status.failure or model.stored.failure:
            return [f"{name}: {failure}"]
        waits = name in self._preloading and model.status.state != "ready"
        return [f"{name}: {model.status.state}, to be loaded before the service is ready"] if waits else []
