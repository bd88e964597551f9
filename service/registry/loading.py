"""Loads models on a thread of their own, and tells of it: log lines, metrics, one kind of error."""

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import structlog

from service.errors import DeviceFailed, ModelLoadFailed, ServiceError
from service.execution.executable import Executable
from service.execution.plan_cache import PlanCache
from service.execution.tuning import Limits
from service.machine.memory import give_back, held_bytes
from service.machine.workers import Workers, detached
from service.metrics import EngineMetrics
from service.options import EngineOptions, make_backends
from service.registry.footprints import Footprint, Footprints
from service.registry.loader import load
from service.store.store import StoredModel

T = TypeVar("T")

log = structlog.get_logger(component="loading")


class Loading:
    """One load at a time, since each measures what it loads; it lives until it is closed."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics) -> None:
        self._metrics = metrics
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
        # Mutable state: why no GPU is to be expected to work any more, once one has failed.
        self.failed_device = ""

    def close(self) -> None:
        """Drop what waits; a load under way ends in its own time."""
        self._thread.close(wait=False)

    async def load(self, stored: StoredModel) -> Executable:
        """`stored`, ready to run.

        Raises:
            ModelLoadFailed, WeightsUnavailable: it can't be loaded; the message says why.
        """
        start = perf_counter()
        try:
            executable = await self._thread.run(load, stored, self._backends, self._limits, self._plans)
        except ServiceError as error:
            self._metrics.model_loads.labels(stored.id, "failed").inc()
            log.warning("model_load_failed", model=stored.id, reason=str(error))
            raise
        except Exception as error:
            self._metrics.model_loads.labels(stored.id, "failed").inc()
            log.exception("model_load_failed", model=stored.id)
            raise ModelLoadFailed(f"{stored.id} could not be loaded: {type(error).__name__}: {error}") from error
        report = executable.report
        self._metrics.model_loads.labels(stored.id, "loaded").inc()
        self._metrics.model_load_seconds.labels(stored.id).observe(perf_counter() - start)
        self._remember(executable)
        self.failed_device = self.failed_device or report.device_failure
        log.info("model_loaded", model=stored.id, backend=report.backend, precision=report.precision,
                 layout=f"{report.layout.streams}x{report.layout.threads}", batch_sizes=executable.plan.sizes,
                 cached=report.cached, seconds=round(report.load_seconds, 3),
                 version=stored.version, memory_bytes=report.memory_bytes)  # fmt: skip
        return executable

    def footprint(self, stored: StoredModel) -> Footprint:
        """What loading `stored` took last, else an estimate."""
        return self._footprints.of(stored)

    async def free(self, model: StoredModel, only: list[T]) -> None:
        """Take out the one model in `only`, to which nothing else refers, and give its memory back to the kernel."""
        before = held_bytes()
        await self._thread.run(_drop, only)
        log.info("model_unloaded", model=model.id, version=model.version, freed_bytes=before - held_bytes())

    async def extend(self, stored: StoredModel, make: Callable[[], T]) -> T:
        """What `make` compiles for `stored`, which is loaded, on the thread for loading.

        Raises:
            ModelLoadFailed, WeightsUnavailable: it can't be made; the message says why.
        """
        start = perf_counter()
        try:
            made = await self._thread.run(make)
        except ServiceError as error:
            if isinstance(error, DeviceFailed):
                self.failed_device = str(error)
            log.warning("model_extension_failed", model=stored.id, reason=str(error))
            raise
        except Exception as error:
            log.exception("model_extension_failed", model=stored.id)
            raise ModelLoadFailed(f"{stored.id} could not be compiled anew: {type(error).__name__}: {error}") from error
        log.info("model_extended", model=stored.id, seconds=round(perf_counter() - start, 3))
        return made

    async def improve(self, executable: Executable, tell: Callable[[], None]) -> None:
        """Have `executable` make better graphs, and `tell` each time that it runs in one more.

        What takes minutes is done one model at a time, while others load; the rest in turn with loads. Whoever cancels
        this waits for nothing, and what is being compiled then is given up.
        """
        start = perf_counter()
        notes: list[str] = []
        while improving := executable.improving:
            notes = improving.notes
            async with self._preparing:
                try:
                    await detached(improving.prepare)
                except asyncio.CancelledError:
                    improving.stop()
                    raise
            if better := await self._thread.run(executable.improve):
                self._remember(executable)
                tell()
                log.info("model_improved", model=executable.stored.id, batch_size=better.size,
                         ms=round(better.seconds * 1000, 3), seconds=round(perf_counter() - start, 3))  # fmt: skip
            self.failed_device = self.failed_device or improving.device_failure
        for note in notes:
            log.warning("plan_note", model=executable.stored.id, note=note)

    async def widen(self, executable: Executable) -> None:
        """What can wait until the model answers; without it the model goes on as it is."""
        try:
            await self._thread.run(executable.widen)
            self._remember(executable)
        except Exception:
            log.exception("model_not_widened", model=executable.stored.id)

    def _remember(self, executable: Executable) -> None:
        taken = executable.report.memory_bytes + executable.added_bytes
        footprint = Footprint(bytes=max(0, taken), seconds=executable.report.load_seconds)
        self._footprints.remember(executable.stored, footprint)


def _drop(only: list[T]) -> None:
    only.clear()
    give_back()
