"""Loads models on a thread for that, optimizes their graphs while they serve, and frees them again."""

import asyncio
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TypeVar

import structlog

from service.backends.base import DeviceHealth
from service.errors import ModelLoadFailed, ServiceError
from service.execution.executable import Executable
from service.execution.plan_cache import PlanCache
from service.execution.tuning import Limits
from service.machine import give_back, held_bytes
from service.metrics import EngineMetrics
from service.options import EngineOptions, make_backends
from service.pipeline import Pipeline
from service.registry.catalog import Catalog
from service.registry.entries import UnloadReason
from service.registry.loader import load
from service.registry.residency import Footprint, Footprints
from service.registry.resident import Resident
from service.store.store import StoredModel
from service.workers import Workers, detached

T = TypeVar("T")

log = structlog.get_logger(component="loading")


class Loading:
    """A `registry.Loader`. One load at a time, since each measures what it takes; it lives until it is closed."""

    def __init__(
        self,
        options: EngineOptions,
        metrics: EngineMetrics,
        pipeline: Pipeline,
        catalog: Catalog,
        devices: DeviceHealth,
    ) -> None:
        self._options = options
        self._metrics = metrics
        self._pipeline = pipeline
        self._catalog = catalog
        self._devices = devices
        self._backends = make_backends(options)
        self._limits = Limits(options.cores, options.max_batch_size, options.precision)
        self._plans = PlanCache(options.cache) if options.cache else None
        kind = f"{options.backend}-{options.precision or 'auto'}-{options.instances}x{options.cores}"
        where = "".join(f"-{name}" for name in options.devices)
        self._footprints = Footprints(
            options.cache,
            f"{kind}-{options.max_batch_size}{where}",
            compiled=options.backend != "torch" and not options.devices,
        )
        self._thread = Workers("load", 1)
        self._preparing = asyncio.Lock()
        # Mutable state: for each model, the task that optimizes its graphs.
        self._optimizing: dict[Resident, asyncio.Task[None]] = {}

    async def load(self, stored: StoredModel) -> Resident:
        """`stored`, ready to run.

        Raises:
            ModelLoadFailed, WeightsUnavailable: it can't be loaded; the message says why.
        """
        start = perf_counter()
        try:
            async with self._catalog.fetched(stored) as local:
                blocking = partial(load, local, self._backends, self._limits, self._plans, self._devices)
                executable = await self._on_thread("model_load_failed", "loaded", stored, blocking)
        except ServiceError:
            self._metrics.model_loads.labels(stored.id, "failed").inc()
            raise
        report = executable.report
        self._metrics.model_loads.labels(stored.id, "loaded").inc()
        self._metrics.model_load_seconds.labels(stored.id).observe(perf_counter() - start)
        self._remember(executable)
        log.info("model_loaded", model=stored.id, backend=report.backend, precision=report.precision,
                 layout=f"{report.layout.streams}x{report.layout.threads}", batch_sizes=executable.plan.sizes,
                 cached=report.cached, seconds=round(report.load_seconds, 3),
                 version=stored.version, memory_bytes=report.memory_bytes)  # fmt: skip
        compile_ = partial(self._extend, executable.stored)
        resident = Resident(executable, self._pipeline, compile_, max_others=self._options.sizes_per_model)
        self._optimizing[resident] = asyncio.create_task(self._optimize(resident))
        self._optimizing[resident].add_done_callback(lambda _: self._optimizing.pop(resident, None))
        return resident

    async def unload(self, only: list[Resident]) -> None:
        """Take out the one model in `only`, to which nothing else refers, and return its memory to the kernel."""
        await self._end_optimizing(only[0])
        await only[0].close()
        stored, before = only[0].executable.stored, held_bytes()
        await self._thread.run(_drop, only)
        log.info("model_unloaded", model=stored.id, version=stored.version, freed_bytes=before - held_bytes())

    def memory_bytes(self, loaded: Resident) -> int:
        """The measured memory that it takes now."""
        return loaded.memory_bytes

    def footprint(self, stored: StoredModel) -> Footprint:
        """What loading `stored` took last, else an estimate."""
        return self._footprints.of(stored)

    def unloading(self, reason: UnloadReason) -> None:
        """Count an unloading."""
        self._metrics.evictions.labels(reason).inc()

    async def stop(self) -> None:
        """Stop optimizing all models."""
        tasks = [*self._optimizing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Drop what waits; a load under way ends in its own time."""
        self._thread.close(wait=False)

    async def _end_optimizing(self, resident: Resident) -> None:
        # Apart from `unload`, which would keep the task, and with its cancellation all frames that lead to the model.
        if task := self._optimizing.pop(resident, None):
            task.cancel()
            await asyncio.wait([task])

    async def _extend(self, stored: StoredModel, make: Callable[[], T]) -> T:
        """What `make` compiles for `stored`, which is loaded.

        Raises:
            ModelLoadFailed, WeightsUnavailable: it can't be made; the message says why.
        """
        start = perf_counter()
        async with self._catalog.fetched(stored):  # `make` may read the weights again
            made = await self._on_thread("model_extension_failed", "compiled anew", stored, make)
        log.info("model_extended", model=stored.id, seconds=round(perf_counter() - start, 3))
        return made

    async def _on_thread(self, event: str, done: str, stored: StoredModel, blocking: Callable[[], T]) -> T:
        """`blocking`, on the thread for loading; every failure is logged as `event`, and a ServiceError."""
        try:
            with self._devices.watched():
                return await self._thread.run(blocking)
        except ServiceError as error:
            log.warning(event, model=stored.id, reason=str(error))
            raise
        except Exception as error:
            log.exception(event, model=stored.id)
            raise ModelLoadFailed(f"{stored.id} could not be {done}: {type(error).__name__}: {error}") from error

    async def _optimize(self, resident: Resident) -> None:
        """Make the graphs that a model's first responses can do without; if that fails, the model serves as it is.

        The part that takes minutes runs for one model at a time, while others load; the rest takes turns with loads.
        Cancelling this waits for nothing, and stops the compiler.
        """
        executable, start = resident.executable, perf_counter()
        notes: list[str] = []
        try:
            await self._thread.run(executable.add_latency_graph)
            self._remember(executable)
        except Exception:
            log.exception("latency_graph_failed", model=executable.stored.id)
        while optimizer := executable.optimizer:
            notes = optimizer.notes
            async with self._preparing:
                try:
                    await detached(optimizer.prepare)
                except asyncio.CancelledError:
                    optimizer.stop()
                    raise
            if optimized := await self._thread.run(executable.optimize):
                self._remember(executable)
                resident.replan()
                log.info("model_improved", model=executable.stored.id, batch_size=optimized.size,
                         ms=round(optimized.seconds * 1000, 3), seconds=round(perf_counter() - start, 3))  # fmt: skip
        for note in notes:
            log.warning("plan_note", model=executable.stored.id, note=note)

    def _remember(self, executable: Executable) -> None:
        taken = executable.report.memory_bytes + executable.added_bytes
        footprint = Footprint(bytes=max(0, taken), seconds=executable.report.load_seconds)
        self._footprints.remember(executable.stored, footprint)


def _drop(only: list[T]) -> None:
    only.clear()
    give_back()
