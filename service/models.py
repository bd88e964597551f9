"""The models: which there are, which are in memory, and the loading of those that are asked for."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog

from service.errors import ServiceError
from service.loading import Loading
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.pipeline import Pipeline
from service.registry import Registry, Status
from service.residents import Resident
from service.store import StoredModel
from service.supply import Supply
from service.workers import Workers

T = TypeVar("T")

log = structlog.get_logger(component="models")

STORE_SECONDS = 2.0  # a store on a network that takes longer to list its cards is no good to serve from
PRELOAD_AGAIN_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model of the store, and where it stands in memory."""

    stored: StoredModel
    default: bool
    status: Status[Resident]


class Models:
    """Use as `start`, then `lease`, then `close`. Its methods belong to one event loop."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics, pipeline: Pipeline) -> None:
        self._options = options
        self._pipeline = pipeline
        self._supply = Supply(options)
        self._loading = Loading(options, metrics)
        self._registry = Registry[Resident](self._find, self._load)
        # Mutable state: work that no request waits for.
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to load what is to be preloaded, and say so if the default model can't be had."""
        for name in {self._options.default_model} - {*self._options.preload}:
            for reason in await self._unready(name):
                log.warning("default_model_unavailable", reason=reason)
        for name in self._options.preload:
            self._background(self._preload(name))

    async def stop(self) -> None:
        """Load no more and forget what is loaded; no request may be under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._registry.close()

    def close(self) -> None:
        """End the threads, once nothing runs a model any more."""
        self._loading.close()
        self._supply.close()

    def lease(self, name: str | None) -> AbstractAsyncContextManager[Resident]:
        """The model called `name`, or the default one, in memory for as long as the context lasts.

        Raises:
            ModelNotFound, WeightsUnavailable, ModelLoadFailed: it can't be had.
        """
        return self._registry.lease(self._options.default_model if name is None else name)

    def loaded(self) -> list[Resident]:
        """Every model that is in memory."""
        return self._registry.loaded()

    async def all(self) -> list[ModelStatus]:
        """Every model of the store, and every other that is loaded.

        Raises:
            WeightsUnavailable: the store can't be read.
        """
        default = await self._default_id()
        found = {stored.id: stored for stored in await self._supply.models()}
        known = found | {resident.id: resident.executable.stored for resident in self._registry.loaded()}
        return [self._status(stored, default) for _, stored in sorted(known.items())]

    async def one(self, name: str) -> ModelStatus:
        """The model called `name`.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has none.
        """
        return self._status(await self._find(name), await self._default_id())

    async def unready(self) -> list[str]:
        """Why the default model, or what is preloaded, would not answer; empty when they do, or would if asked."""
        reasons: list[str] = []
        try:
            async with asyncio.timeout(STORE_SECONDS):
                for name in dict.fromkeys((self._options.default_model, *self._options.preload)):
                    reasons.extend(await self._unready(name))
        except TimeoutError:
            reasons.append(f"the model store has not answered for {STORE_SECONDS:.0f} s")
        return reasons

    def stalled(self, *others: Workers) -> list[str]:
        """A reason for each thread, the pipeline's, the store's and `others`, that does not move."""
        return self._pipeline.stalled(self._supply.thread, *others)

    async def _preload(self, name: str) -> None:
        """Load `name`; what fails is tried again, since it keeps the service from being ready."""
        while True:
            try:
                async with self._registry.lease(name):
                    return
            except ServiceError as error:
                log.warning("preload_failed", model=name, reason=str(error), again_in_seconds=PRELOAD_AGAIN_SECONDS)
            except Exception:
                log.exception("preload_failed", model=name, again_in_seconds=PRELOAD_AGAIN_SECONDS)
            await asyncio.sleep(PRELOAD_AGAIN_SECONDS)

    async def _find(self, name: str) -> StoredModel:
        if loaded := self._registry.find_loaded(name):
            return loaded.executable.stored
        return await self._supply.find(name)

    async def _default_id(self) -> str | None:
        try:
            return (await self._find(self._options.default_model)).id
        except ServiceError:
            return None

    def _status(self, stored: StoredModel, default: str | None) -> ModelStatus:
        """What runs counts, not what has become of its folder since."""
        status = self._registry.status(stored.id)
        return ModelStatus(status.loaded.executable.stored if status.loaded else stored, stored.id == default, status)

    async def _load(self, stored: StoredModel) -> Resident:
        async with self._supply.fetched(stored) as local:
            executable = await self._loading.load(local)
        self._background(self._loading.widen(executable))
        compile_ = partial(self._extend, executable.stored)
        return Resident(executable, self._pipeline, compile_, max_others=self._options.sizes_per_model)

    async def _extend(self, stored: StoredModel, make: Callable[[], T]) -> T:
        async with self._supply.fetched(stored):  # `make` may read the weights again
            return await self._loading.extend(stored, make)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unready(self, name: str) -> list[str]:
        try:
            model = await self.one(name)
        except ServiceError as error:
            return [f"{name}: {error}"]
        if failure := model.status.failure or model.stored.failure:
            return [f"{name}: {failure}"]
        waits = name in self._options.preload and model.status.state != "ready"
        return [f"{name}: {model.status.state}, to be loaded before the service is ready"] if waits else []
