"""From a model in the store to one that can run: module, weights, graphs, batch plan; and free again.

`load` is blocking, and takes seconds. `Loading` calls it on a thread for that, and optimizes graphs while they serve.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TypeVar

import numpy as np
import structlog

from service.backends.base import Backend, DeviceHealth, build, plain_logits
from service.errors import (
    DeviceFailed,
    GoldenMismatch,
    MemoryExhausted,
    ModelLoadFailed,
    OutOfMemory,
    ReferenceInvalid,
    ServiceError,
)
from service.execution.executable import CheckedGraphs, Executable, LoadReport
from service.execution.plan import BatchPlan
from service.execution.plan_cache import CachedPlan, PlanCache, digest, machine
from service.execution.reference import (
    Reference,
    ReferenceCheck,
    computed_reference,
    packed,
    reference_of,
)
from service.execution.tuning import LatencyGraph, Limits, Optimizer, Tuned, Tuning
from service.machine import give_back, held_bytes, peak_of
from service.memory import MODELS, MemoryBudget, Reservation
from service.metrics import EngineMetrics
from service.options import EngineOptions, make_backends
from service.pipeline import Pipeline
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
        self._load = lambda stored, compiling: load(stored, backends, limits, plans, devices, compiling=compiling)
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
            async with self._catalog.fetched(stored) as local, self._one_at_a_time:
                executable, held = await self._loaded(stored, local, free)
        except ServiceError:
            self._metrics.model_loads.labels(stored.id, "failed").inc()
            raise
        report = executable.report
        self._metrics.model_loads.labels(stored.id, "loaded").inc()
        self._metrics.model_load_seconds.labels(stored.id).observe(perf_counter() - start)
        log.info("model_loaded", model=stored.id, backend=report.backend, precision=report.precision,
                 layout=f"{report.layout.streams}x{report.layout.threads}", batch_sizes=executable.plan.sizes,
                 cached=report.cached, seconds=round(report.load_seconds, 3),
                 version=stored.version, memory_bytes=report.memory_bytes)  # fmt: skip
        resident = self._resident(executable, compile_=partial(self._extend, executable.stored, held))
        self._held[resident] = held
        self._optimizing[resident] = asyncio.create_task(self._optimize(resident))
        self._optimizing[resident].add_done_callback(lambda _: self._optimizing.pop(resident, None))
        return resident

    async def _loaded(self, stored: StoredModel, local: StoredModel, free: Free) -> tuple[Executable, Reservation]:
        """The loaded model, and the memory that it keeps; the peak of its load is reserved meanwhile.

        Graphs from the plan cache take less. Where they turn out to be of no use, what compiling takes is reserved on
        the thread, without evicting anything, or it ends there.
        """
        cached = self._plans is not None and self._plans.has(stored.id, stored.version)
        held = await self._reserved(stored.key, self._footprints.peak_bytes(stored, cached=cached), free)
        whole = self._footprints.peak_bytes(stored, cached=False)
        compiling = lambda: self._grow(held, whole, stored.key)  # noqa: E731
        try:
            load_ = partial(self._load, local, compiling)
            executable, peak = await self._on_thread("model_load_failed", "loaded", stored, partial(peak_of, load_))
        except BaseException:
            held.release()
            raise
        self._remember(executable, min(peak, whole) if not executable.report.cached else 0)
        _settle(held, executable.report.memory_bytes if executable.report.device == "cpu" else 0)
        return executable, held

    async def _reserved(self, name: str, count: int, free: Free) -> Reservation:
        """Memory for `name`; models that are idle are evicted for it."""
        held: list[Reservation] = []

        def missing() -> int:
            if reserved := self._memory.try_reserve(count, MODELS):
                held.append(reserved)
                return 0
            return max(1, count - self._memory.left())

        with _named(name):
            self._memory.require_possible(count, MODELS)
            if missing():
                await free(missing)
            return held[0] if held else self._memory.reserve(count, MODELS)

    def _grow(self, held: Reservation, whole: int, name: str) -> None:
        if held.count < whole:
            with _named(name):
                held.grow(whole - held.count)

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

    async def _extend(self, stored: StoredModel, held: Reservation, make: Callable[[], T]) -> T:
        """What `make` compiles for `stored`, which is loaded and holds memory; raises as `load`, and evicts nothing."""
        start, before = perf_counter(), held.count
        async with self._catalog.fetched(stored), self._one_at_a_time:  # `make` may read the weights again
            self._grow(held, before + self._footprints.peak_bytes(stored, cached=False), stored.key)
            taken = held_bytes()
            try:
                extension = await self._on_thread("model_extension_failed", "compiled anew", stored, make)
            finally:
                _settle(held, before + max(0, held_bytes() - taken))
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


def load(
    stored: StoredModel,
    backends: Sequence[Callable[[], Backend]],
    limits: Limits,
    cache: PlanCache | None = None,
    devices: DeviceHealth | None = None,
    *,
    compiling: Callable[[], object] = lambda: None,
) -> Executable:
    """Load `stored` on the first of `backends` that can run it, with the plan in `cache`, else with a measured one.

    A backend that does not reproduce the model's reference logits can't run it. `devices` notes the failure of a GPU.
    `compiling` is called before that begins, which takes most memory.

    Raises:
        ModelLoadFailed: the card or the weights are wrong, or the model computes no finite numbers.
        MemoryExhausted: what `compiling` raises.
        Exception: the last backend's, if none could run it.
    """
    start, devices = perf_counter(), devices or DeviceHealth()
    failures: list[str] = []
    for i, make in enumerate(backends, 1):
        name = f"backend number {i}"
        try:
            with devices.watched():
                backend = make()
                name = backend.name if backend.device == "cpu" else f"{backend.name} on {backend.device}"
                memory = backend.memory_bytes()  # after its libraries, which are not the model's memory
                own = reference_of(stored.require_card(), stored.folder)
                attempt = _Attempt(stored, backend, limits, cache, devices, own, failures, memory, start)
                if restored := attempt.restored():
                    return restored
                compiling()
                return attempt.measured()
        except Exception as error:
            wrong = isinstance(error, GoldenMismatch)
            # Other errors of ours are about the model's files, which are the same on every backend.
            if isinstance(error, ServiceError) and not isinstance(error, GoldenMismatch | OutOfMemory | DeviceFailed):
                raise
            failures.append(f"{name} failed: {error if wrong else f'{type(error).__name__}: {error}'}")
            if i < len(backends):
                log.warning("backend_failed", model=stored.id, reason=failures[-1])
            elif wrong:
                raise _mismatch(stored, failures, limits) from error
            else:
                raise
    raise ValueError("no backend to load on")


def _mismatch(stored: StoredModel, failures: Sequence[str], limits: Limits) -> GoldenMismatch:
    """The model's own module reproduces the logits: `ReferenceCheck` has found that out."""
    forced = limits.precision not in {None, "float32"}
    advice = "set PVT_PRECISION=auto" if forced else "try another PVT_BACKEND, or other versions of openvino and torch"
    return GoldenMismatch(
        f"{stored.key} does not give the logits of its reference images, so it is not served: {'; '.join(failures)}; "
        f"its plain float32 module does give them: {advice}"
    )


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Loads `stored` on `backend`. `own` is the reference that its card names.

    `failures` are those of other backends; the load began at `start` with `memory` bytes in use.
    """

    stored: StoredModel
    backend: Backend
    limits: Limits
    cache: PlanCache | None
    devices: DeviceHealth
    own: Reference | None
    failures: Sequence[str]
    memory: int
    start: float

    def restored(self) -> Executable | None:
        """The model with plan and graphs from the cache, if it has an entry."""
        stored, cache, restore = self.stored, self.cache, self.backend.restore
        if not (cache and restore and (found := cache.read(stored.id, stored.version, self._key()))):
            return None
        entry, paths = found
        blobs = {size: np.memmap(path, np.uint8, "r") for size, path in paths.items()}
        try:
            graphs = {size: restore(blob, entry.layout, entry.precision) for size, blob in blobs.items()}
            latency, plan = None, BatchPlan(entry.seconds, entry.alone_seconds)
            if (layout := entry.alone_layout) and entry.alone_seconds:
                make = partial(restore, blobs[1], layout, entry.precision)
                latency = LatencyGraph(layout, entry.alone_seconds, make)
            check = self._check(self.own or self._cached_reference(cache, entry))
            deviation = check.check_restored(graphs, plan.time(1))
            tuned = Tuned(entry.precision, entry.layout, plan, graphs, latency, entry.notes, deviation)
            return self._executable(tuned, check, cached=True)
        except Exception as error:  # noqa: BLE001  whatever is wrong with it, it can be made anew
            log.warning("plan_cache_ignored", model=stored.id, reason=f"{type(error).__name__}: {error}")
            return None

    def measured(self) -> Executable:
        """The model with a plan and graphs that are made and measured now, and written to the cache."""
        card = self.stored.require_card()
        shape = card.preprocessing.height, card.preprocessing.width
        module = build(card, self.stored.folder)
        check = self._check(self.own or computed_reference(module, *shape))
        program = self.backend.program(module, *shape)
        tuned = Tuning(self.backend, program, check, shape, self.limits).run()
        optimizer = None
        if optimized := program.optimized:
            optimizer = Optimizer(
                program, optimized, tuned.layout, tuned.precision, shape, check.check, tuned.plan, self.limits,
                self.devices,
            )  # fmt: skip
        del module, program, optimized  # nothing else needs the plain weights
        if self.cache and self.backend.restore:
            self._write(self.cache, tuned, check.reference)
        for note in tuned.notes:
            log.warning("plan_note", model=self.stored.id, note=note)
        return self._executable(tuned, check, optimizer, cached=False)

    def _executable(
        self, tuned: Tuned, check: ReferenceCheck, optimizer: Optimizer | None = None, *, cached: bool
    ) -> Executable:
        stored, backend = self.stored, self.backend
        report = LoadReport(
            backend=backend.name,
            device=backend.device,
            precision=tuned.precision,
            layout=tuned.layout,
            notes=(*self.failures, *tuned.notes),
            cached=cached,
            memory_bytes=max(stored.require_card().weights.bytes, backend.memory_bytes() - self.memory),
            load_seconds=perf_counter() - self.start,
            deviation=tuned.deviation,
        )
        checked = CheckedGraphs(stored.id, tuned.precision, check, forced=self.limits.precision is not None)
        return Executable(stored, backend, tuned, report, checked=checked, optimizer=optimizer)

    def _write(self, cache: PlanCache, tuned: Tuned, reference: Reference) -> None:
        """Cache the plan and its graphs, and the reference if it was computed."""
        computed = None if self.own else packed(reference)
        entry = CachedPlan(
            key=self._key(),
            precision=tuned.precision,
            layout=tuned.layout,
            seconds=dict(tuned.plan.seconds),
            alone_seconds=tuned.plan.alone_seconds,
            alone_layout=tuned.latency.layout if tuned.latency else None,
            notes=tuned.notes,
            graphs={},
            reference=computed and computed[1],
        )
        files = {computed[1].file: computed[0]} if computed else {}
        known = {1: tuned.latency.blob} if tuned.latency and tuned.latency.blob is not None else {}
        # One after another: OpenVINO copies what it exports several times.
        exported = ((size, known[size] if size in known else graph.export()) for size, graph in tuned.graphs.items())
        cache.write(self.stored.id, self.stored.version, entry, exported, files)

    def _cached_reference(self, cache: PlanCache, entry: CachedPlan) -> Reference:
        folder = cache.folder(self.stored.id, self.stored.version)
        reference = reference_of(self.stored.require_card(), folder, entry.reference)
        if reference is None:
            raise ReferenceInvalid("the entry has no reference images")
        return reference

    def _check(self, reference: Reference) -> ReferenceCheck:
        card, folder = self.stored.require_card(), self.stored.folder
        if reference is not self.own or card.reference is None:
            return ReferenceCheck(reference)
        source = str(folder / card.reference.file)
        return ReferenceCheck(reference, source, lambda: plain_logits(build(card, folder), reference.images))

    def _key(self) -> dict[str, str]:
        """Everything that plan and graphs depend on."""
        card = self.stored.require_card()
        pixels = card.preprocessing
        return {
            "weights": card.weights.sha256,
            "card": digest(card.model_dump_json().encode()),
            "input": f"{pixels.height}x{pixels.width}",
            "backend": f"{self.backend.name} {self.backend.version}",
            "instances": str(self.backend.instances),
            "cores": str(self.limits.cores),
            "max_batch_size": str(self.limits.max_batch_size),
            "precision": self.limits.precision or "auto",
            **machine(),
        }
