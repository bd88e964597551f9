"""Models into memory and out again, one at a time: `loader` does the work on a thread, within the memory there is.

What their first responses can do without, such as faster graphs, is made while they serve.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from time import perf_counter
from typing import TypeVar

import structlog

from service.backends.base import DeviceHealth
from service.errors import (
    MemoryExhausted,
    ModelLoadFailed,
    ServiceError,
)
from service.execution.executable import Executable
from service.execution.plan_cache import PlanCache
from service.execution.tuning import Limits, Reserve
from service.machine import give_back, held_bytes, peak_of, resident_bytes
from service.memory import MODELS, MemoryBudget, Reservation
from service.metrics import EngineMetrics
from service.options import EngineOptions, make_backends
from service.pipeline import Pipeline
from service.registry import loader
from service.registry.catalog import Catalog
from service.registry.residency import Footprint, Footprints
from service.registry.resident import Resident
from service.registry.versions import Free, UnloadReason
from service.sharing import cancel
from service.store.store import StoredModel
from service.workers import Workers, detached

T = TypeVar("T")

log = structlog.get_logger(component="loader")


class Loading:
    """A `Loader`. One load at a time, since each measures what it takes; it lives until it is closed."""

    def __init__(
        self,
        options: EngineOptions,
        metrics: EngineMetrics,
        pipeline: Pipeline,
        catalog: Catalog,
        devices: DeviceHealth,
        *,
        memory: MemoryBudget,
    ) -> None:
        self._metrics = metrics
        self._catalog = catalog
        self._devices = devices
        self._memory = memory
        plans = PlanCache(options.cache) if options.cache else None
        limits, backends = Limits(options.cores, options.max_batch_size, options.precision), make_backends(options)
        self._plans = plans
        self._load = partial(loader.load, backends=backends, limits=limits, cache=plans, devices=devices)
        self._resident = partial(Resident, pipeline=pipeline, max_others=options.sizes_per_model)
        kind = (options.backend, options.precision or "auto", f"{options.instances}x{options.cores}",
                str(options.max_batch_size), *options.devices)  # fmt: skip
        compiled = options.backend != "torch" and not options.devices
        self._footprints = Footprints(options.cache, "-".join(kind), compiled=compiled)
        self._thread = Workers("load", 1)
        self._preparing = asyncio.Lock()
        self._one_at_a_time = asyncio.Lock()
        # Mutable state: for each model, the memory that is reserved for it, and the task that optimizes its graphs.
        self._held: dict[Resident, Reservation] = {}
        self._optimizing: dict[Resident, asyncio.Task[None]] = {}

    async def load(self, stored: StoredModel, free: Free) -> Resident:
        """`stored`, ready to run; `free` evicts others.

        Raises:
            ModelLoadFailed, WeightsUnavailable: it can't be; the message says why.
            MemoryExhausted: what the load takes at its peak is not free, and is not made free.
        """
        start = perf_counter()
        try:
            async with self._catalog.fetched(stored) as local:
                fetched = perf_counter()
                async with self._one_at_a_time:
                    executable, held = await self._loaded(stored, local, free)
        except ServiceError:
            self._metrics.model_loads.labels(stored.id, "failed").inc()
            raise
        report = executable.report
        self._metrics.model_loads.labels(stored.id, "loaded").inc()
        self._metrics.plan_cache.labels(stored.id, "hit" if report.cached else "miss").inc()
        self._metrics.model_loaded(stored.id, perf_counter() - start, {"fetch": fetched - start, **report.steps})
        log.info("model_loaded", model=stored.id, backend=report.backend, precision=report.precision,
                 layout=f"{report.layout.streams}x{report.layout.threads}", batch_sizes=executable.plan.sizes,
                 cached=report.cached, seconds=round(report.load_seconds, 3),
                 version=stored.version, memory_bytes=report.memory_bytes)  # fmt: skip
        resident = self._resident(executable, compile_=partial(self._extend, held, free))
        self._held[resident] = held
        self._optimizing[resident] = asyncio.create_task(self._optimize(resident))
        self._optimizing[resident].add_done_callback(lambda _: self._optimizing.pop(resident, None))
        return resident

    async def _loaded(self, stored: StoredModel, local: StoredModel, free: Free) -> tuple[Executable, Reservation]:
        """The loaded model, and the memory that it keeps; the peak of its load is reserved meanwhile.

        Graphs from the plan cache take less. Where they turn out to be of no use, what compiling takes is reserved on
        the thread, without evicting anything, or it ends there; so is what graphs for larger batches take.
        """
        cached = self._plans is not None and self._plans.has(stored.id, stored.version)
        held, needed = self._memory.reserve(0, MODELS), self._footprints.peak_of_one(stored)
        whole = self._footprints.peak_bytes(stored, cached=False)

        def larger(pixels: int) -> None:
            nonlocal needed
            needed += self._footprints.graph_bytes(stored, pixels)
            _grow_to(held, needed, stored.key)

        try:
            await self._obtain(held, self._footprints.peak_bytes(stored, cached=cached), stored.key, free)
            load_ = partial(self._load, local, compiling=lambda: _grow_to(held, whole, stored.key), reserve=larger)
            executable, peak = await self._on_thread("model_load_failed", "loaded", stored, partial(peak_of, load_))
        except BaseException:
            held.release()
            raise
        self._remember(executable, min(peak, held.count) if not executable.report.cached else 0)
        _settle(held, executable.report.memory_bytes if executable.report.device == "cpu" else 0)
        return executable, held

    async def _obtain(self, held: Reservation, count: int, name: str, free: Free) -> None:
        """Let `held` grow by `count` bytes for `name`; models that are idle are evicted for it."""
        whole = held.count + count

        def missing() -> int:
            with suppress(MemoryExhausted):
                _grow_to(held, whole, name)
            return max(1, count - self._memory.left()) if held.count < whole else 0

        with _named(name):
            self._memory.require_possible(whole, MODELS)
        if missing():
            await free(missing)
            _grow_to(held, whole, name)

    async def unload(self, only: list[Resident], reason: UnloadReason) -> None:
        """Take out the one model in `only`, to which nothing else refers, and return its memory to the kernel."""
        self._metrics.evictions.labels(reason).inc()
        held = self._held.pop(only[0])
        await self._end_optimizing(only[0])
        await only[0].close()
        stored, before = only[0].executable.stored, held_bytes()
        await self._thread.run(_drop, only)
        held.release()
        log.info("model_unloaded", model=stored.id, version=stored.version, freed_bytes=before - held_bytes())

    def memory_bytes(self, loaded: Resident) -> int:
        """The measured memory that it takes now."""
        return loaded.memory_bytes

    def footprint(self, stored: StoredModel) -> Footprint:
        """What loading `stored` took last, else an estimate."""
        return self._footprints.of(stored)

    async def stop(self) -> None:
        """Stop optimizing all models."""
        await cancel(self._optimizing.values())

    def close(self) -> None:
        """Drop what waits; a load under way ends in its own time."""
        self._thread.close(wait=False)

    async def _end_optimizing(self, resident: Resident) -> None:
        # Not in `unload`, which would keep the task, and with its cancellation all frames that refer to the model.
        if task := self._optimizing.pop(resident, None):
            task.cancel()
            await asyncio.wait([task])

    async def _extend(
        self, held: Reservation, free: Free, resident: Resident, make: Callable[[Reserve], T], pixels: int
    ) -> T:
        """See `Compile`; `held` is the memory of the model. Raises as `load`."""
        start, stored = perf_counter(), resident.executable.stored
        name = f"{stored.key}, at this size or with stage maps,"
        async with self._catalog.fetched(stored), self._one_at_a_time:  # `make` reads the weights again
            _settle(held, _kept_bytes(resident))  # without the input sizes that have been evicted
            before, taken = held.count, resident_bytes()
            await self._obtain(held, self._footprints.extension_bytes(stored, pixels), name, free)
            make_ = partial(make, lambda more: held.grow(self._footprints.graph_bytes(stored, more)))
            try:
                extension = await self._on_thread("model_extension_failed", "compiled anew", stored, make_)
            finally:
                _settle(held, before + max(0, resident_bytes() - taken))
        log.info("model_extended", model=stored.id, seconds=round(perf_counter() - start, 3))
        return extension

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

    def _remember(self, executable: Executable, peak_bytes: int = 0) -> None:
        """Keep what it takes, and the peak of its load; 0: as it was."""
        peak_bytes = peak_bytes or self._footprints.of(executable.stored).peak_bytes
        taken = executable.report.memory_bytes + executable.added_bytes
        footprint = Footprint(bytes=max(0, taken), seconds=executable.report.load_seconds, peak_bytes=peak_bytes)
        self._footprints.remember(executable.stored, footprint)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the model in a refusal."""
    try:
        yield
    except MemoryExhausted as error:
        raise MemoryExhausted(f"{name} can't be loaded: {error}", error.retry_after_seconds) from error


def _grow_to(held: Reservation, whole: int, name: str) -> None:
    if held.count < whole:
        with _named(name):
            held.grow(whole - held.count)


def _kept_bytes(resident: Resident) -> int:
    """Of this machine's memory: models on GPUs keep none."""
    return resident.memory_bytes if resident.executable.report.device == "cpu" else 0


def _settle(held: Reservation, count: int) -> None:
    """Hold `count` bytes from now on; where they are in use already and exceed the budget, what was held before."""
    if count < held.count:
        held.shrink(held.count - count)
    else:
        with suppress(MemoryExhausted):
            held.grow(count - held.count)


def _drop(only: list[T]) -> None:
    only.clear()
    give_back()
