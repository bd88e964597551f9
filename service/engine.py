"""The facade: image bytes in, results out; and all there is to do with models. HTTP knows only this of `service`."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from math import inf
from time import monotonic
from types import TracebackType
from typing import Self, TypeVar
from weakref import WeakValueDictionary

import structlog

from service import memory
from service.acquisition.pulling import RemoteModel
from service.architecture.variants import VARIANTS
from service.awake import AwakeClock
from service.backends.base import DeviceHealth
from service.content_cache import CacheUse, ContentCache
from service.errors import DeadlineExceeded, InvalidRequest, ServiceError, ShuttingDown, WeightsUnavailable
from service.execution.executable import Executable
from service.execution.plan_cache import PortablePlan
from service.machine import gpu_memory, gpu_utilization
from service.memory import CACHE, Reservation
from service.metrics import EngineMetrics, Labels
from service.options import EngineOptions
from service.pipeline import Pipeline, Sized
from service.registry.canaries import Canaries
from service.registry.catalog import Catalog, watch
from service.registry.loading import Loading
from service.registry.registry import Registry
from service.registry.resident import Resident
from service.registry.versions import ModelStatus
from service.results import Health, Image, InferenceResult, Size
from service.scheduling.lanes import Activity
from service.sharing import cancel
from service.store.cards import ModelCard
from service.tracing import BatchTracer, recorded_request
from service.workers import Workers

T = TypeVar("T")
DefaultSize = Callable[[ModelCard], Size | None]
"""The input size of a request that names none, by the model's card; None: the model's own."""

log = structlog.get_logger(component="engine")

STORE_SECONDS = 2.0  # a store on a network that takes longer to list its cards is no good to serve from
PRELOAD_AGAIN_SECONDS = 15.0
ANSWER_BYTES = 1_500_000  # of an answer that is encoded and not sent yet: up to three chunks


class Engine:
    """Use as an async context manager: leaving it finishes what is under way. It belongs to one event loop."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics, trace_batch: BatchTracer | None = None) -> None:
        """`trace_batch`: runs each batch of which an image is traced (`service.tracing`); None: no request is."""
        self.options = options
        self._traces = trace_batch is not None
        self._metrics = metrics
        self.memory = memory.budget(options.memory_bytes, options.max_body_bytes, options.max_map_bytes)
        self._devices = DeviceHealth()
        self._encoders = Workers("encode", 2)  # a small response need not wait for a large one; more slow the loop
        self.memory.reserve(options.cache_bytes, CACHE)
        self._cache = ContentCache(options.cache_bytes, metrics, self._encoders) if options.cache_bytes else None
        self._pipeline = Pipeline(options, metrics, self._devices, self.memory, self._cache, trace_batch=trace_batch)
        self._catalog = Catalog(options)
        self._loading = Loading(options, metrics, self._pipeline, self._catalog, self._devices, memory=self.memory)
        self._registry = Registry[Resident](self._catalog, self._loading, options.budget)
        self.clock = AwakeClock()
        # Mutable state: work that no request waits for; what is to be loaded before the service is ready; the tasks of
        # the requests under way; whether new ones are refused, and whether those under way are ended too.
        self._tasks: set[asyncio.Task[None]] = set()
        self._preloading = {*options.preload, *options.pinned}
        # The models that were last used under a name, at a size, for as long as they are loaded.
        self._last_used = WeakValueDictionary[tuple[str, Size | None, DefaultSize | None], Sized]()
        self._requests: set[asyncio.Task[object]] = set()
        self.leaving = False  # it serves, and is not ready: whoever sends requests here is to send them elsewhere
        self.draining = False
        self._aborted = False

    async def __aenter__(self) -> Self:
        """Begin to load what is to be preloaded, and log why the default model can't be had, if so."""
        self.clock.start()
        for name in {self.options.default_model} - self._preloading:
            for reason in await self._unready(name):
                log.warning("default_model_unavailable", reason=reason)
        for name in self.options.pinned:
            self._background(self._preload(name, self.pin))
        for name in self.options.preload:
            self._background(self._preload(name, self.load))
        if self.options.reload_seconds:
            self._background(watch(self._catalog.folder, self.options.reload_seconds, self.refresh))
        if seconds := self.options.canary_seconds:
            self._background(Canaries(self._registry, self._pipeline, self._metrics, seconds).run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain()
        await cancel(self._tasks)
        await self._registry.close()
        await self._loading.stop()
        await self._pipeline.scheduler.close(wait=not self._aborted)
        self._loading.close()  # nothing runs a model any more
        self._catalog.close()
        self.clock.close()
        self._encoders.close(wait=not self._aborted)

    async def drain(self) -> None:
        """Refuse new requests from now on and wait for those under way."""
        self.draining = True
        while self._requests:
            await asyncio.wait(self._requests)

    def abort(self) -> None:
        """End those under way too: each raises `ShuttingDown` at once."""
        self.draining = self._aborted = True
        for task in self._requests:
            task.cancel()

    def request(self) -> AbstractContextManager[None]:
        """Count this task as a request while the context lasts; nested contexts count once.

        Enter it before reading a request's body, so that a shutdown does not cut off an upload.

        Raises:
            ShuttingDown: no new requests are accepted, or this one has just been ended.
        """
        return _Counted(self)

    async def infer(
        self,
        images: Sequence[Image],
        *,
        model: str | None = None,
        size: Size | None = None,
        default_size: DefaultSize | None = None,
        stages: bool = False,
        check: Callable[[ModelCard], None] = lambda _: None,
        max_wait_seconds: float | None = None,
        timeout_seconds: float | None = None,
        client: str = "",
        held: Reservation | None = None,
        cache: CacheUse | None = None,
        admitting: Callable[[str, str, int], None] = lambda *_: None,
    ) -> InferenceResult:
        """The model's outputs for each of `images`; with stage maps and the head's weights, if `stages` says so.

        Images are resized to `size`, height and width; pixels must have it already. Without it they are resized to
        `default_size` of the card, if that gives one which requests may name, else to the model's own size.
        `check` may refuse the model's card. `max_wait_seconds` limits the wait for a load; None: as the options say.
        The machine is shared fairly among clients. `held` grows by the memory of stage maps, for the caller to release;
        `cache` says how the content cache is used; None: not at all. `admitting` is called once the model is there,
        with its id, its version, and how many images wait or run there.

        Raises:
            InvalidRequest: no such size, or more images or larger stage maps than one request may have.
            ModelNotFound, WeightsUnavailable, ModelLoadFailed, MemoryBudgetExceeded: `model` can't be had.
            MemoryExhausted, QueueFull: no room for stage maps beside other answers, in the queue, or for another size.
            ModelLoading, DeadlineExceeded, ShuttingDown: no time is left to wait, to answer, or for the engine.
        """
        self._check_size(size)
        name = self.options.default_model if model is None else model
        seconds = timeout_seconds or self.options.timeout_seconds
        most = 0.0 if max_wait_seconds is None and self.options.cold == "refuse" else max_wait_seconds
        start = monotonic()
        trace = recorded_request() if self._traces else None
        if trace:
            trace.loading = start
        with self.request():
            async with TimeLimit(seconds) as deadline, self._registry.lease(name, most) as resident:
                check(resident.executable.card)
                used = (size or self._default(default_size, resident.executable.card)) if default_size else size
                if stages:
                    self._reserve_maps(resident.executable, used, len(images), held)
                async with resident.at(used, stages=stages) as sized:
                    load_seconds = monotonic() - start
                    if trace:
                        trace.loaded = start + load_seconds
                    if self._last_used.get((name, size, default_size)) is not sized:
                        self._last_used[name, size, default_size] = sized
                    admitting(sized.executable.stored.id, sized.executable.stored.version, sized.lane.admitted)
                    results = await self._pipeline.infer(
                        sized, images, deadline, stages=stages, client=client, cache=cache
                    )
        if any(isinstance(each, DeadlineExceeded) for each in results):  # all have the same time
            raise _late(seconds)
        return sized.executable.result(results, stages=stages, load_seconds=load_seconds)

    def refusal(
        self,
        *,
        model: str | None = None,
        size: Size | None = None,
        default_size: DefaultSize | None = None,
        timeout_seconds: float | None = None,
        client: str = "",
    ) -> ServiceError | None:
        """What `infer` would raise for one image for want of room or time, if it would; it costs microseconds.

        Ask before a body is read: refusing must not cost what answering does. None where the model was not used yet,
        where so little waits that `infer` may decide, or where the content cache may have the answer.
        """
        name = self.options.default_model if model is None else model
        if self._cache or not (sized := self._last_used.get((name, size, default_size))):
            return None
        deadline = monotonic() + (timeout_seconds or self.options.timeout_seconds)
        return self._pipeline.scheduler.refusal(sized.lane, deadline, client)

    async def models(self) -> list[ModelStatus]:
        """Every model of the store or in memory; raises WeightsUnavailable where neither can be had."""
        return await self._catalog.models(self._registry)

    async def model(self, name: str) -> ModelStatus:
        """The model called `name`; raises ModelNotFound or WeightsUnavailable where the store has none."""
        return await self._catalog.model(name, self._registry)

    def remote_models(self, present: Sequence[ModelStatus]) -> list[RemoteModel]:
        """The published models that are not among those `present` in the store."""
        return self._catalog.pulls.remote({model.id for model in present})

    def remote_model(self, name: str) -> RemoteModel | None:
        """The published model called `name`, for one that is not in the store."""
        return self._catalog.pulls.one(name)

    async def load(self, name: str, max_wait_seconds: float | None = None) -> None:
        """Load the model called `name`, if it is not in memory; raises what `infer` does of models."""
        async with self._registry.lease(name, max_wait_seconds):
            pass

    async def portable_plan(self, name: str) -> PortablePlan:
        """The batch plan of the model called `name`, which is loaded if need be; raises as `load`."""
        async with self._registry.lease(name) as resident:
            return resident.executable.portable_plan()

    async def unload(self, name: str) -> None:
        """Free the model called `name` once nobody uses it; raises ModelPinned, or as `model`."""
        await self.model(name)
        await self._registry.unload(name)

    async def pin(self, name: str) -> None:
        """Load the model called `name`, and never evict it; raises as `load`."""
        await self._registry.pin(name)

    def unpin(self, name: str) -> None:
        """Let the model called `name` be evicted again."""
        self._registry.unpin(name)

    async def refresh(self, *, again: bool = False) -> None:
        """Take over what is new in the store; `again` tries what failed before, too. Returns when all that is done."""
        await self._registry.refresh(again=again)

    async def aliases(self) -> dict[str, str]:
        """Every alias, and what it stands for; raises AliasesInvalid where they can't be read."""
        return await self._catalog.thread.run(self._catalog.store.aliases)

    async def set_alias(self, name: str, target: str) -> None:
        """Let `name` stand for `target`: in the store at once, for requests as soon as that is loaded.

        Raises:
            ServiceError: as `Store.set_alias`; nothing was changed.
        """
        await self._catalog.thread.run(self._catalog.store.set_alias, name, target)
        self._background(self.refresh())

    async def remove_alias(self, name: str) -> None:
        """Let `name` stand for nothing; raises as `Store.remove_alias`."""
        await self._catalog.thread.run(self._catalog.store.remove_alias, name)
        await self.refresh()

    async def encode(self, make: Callable[[], T]) -> T:
        """`make`, which encodes a large response, on a thread for that."""
        return await self._encoders.run(make)

    def encoded(self, model: str, seconds: float) -> None:
        """Count the `seconds` that encoding a response of `model` took."""
        self._metrics.stage_seconds.labels("encode", model).observe(seconds)

    def scored(self, model: str, score: float) -> None:
        """Count an image of `model` whose best class has that score, from 0 to 1."""
        self._metrics.top1_score.labels(model).observe(score)

    def live(self) -> Health:
        """Live while the threads move and no GPU failed; says nothing of readiness, and reads no disk.

        Time in which the whole process was stopped counts for no thread.
        """
        threads = (self._catalog.thread, self._encoders)
        busy = self._pipeline.scheduler.stalled_seconds() | {each.name: each.stalled_seconds() for each in threads}
        reasons = [self._devices.failure] if self._devices.failure else []
        for name, seconds in busy.items():
            if seconds > self.options.stall_seconds:
                awake = self.clock.since(monotonic() - seconds)
                if awake > self.options.stall_seconds:
                    reasons.append(f"a thread for {name} has been at one job for {awake:.0f} s")
        return Health(live=not reasons, ready=not reasons, reasons=reasons)

    async def health(self) -> Health:
        """Live, and ready when the default model and what is preloaded answer, or would once requested."""
        live = self.live()
        reasons = [*live.reasons, *(["the service is shutting down"] if self.leaving or self.draining else [])]
        try:
            async with asyncio.timeout(STORE_SECONDS):
                names = (self.options.default_model, *self.options.preload, *self.options.pinned)
                for name in dict.fromkeys(names):
                    reasons += await self._unready(name)
        except TimeoutError:
            reasons.append(f"the model store has not answered for {STORE_SECONDS:.0f} s")
        return Health(live=live.live, ready=not reasons, reasons=reasons)

    def activity(self) -> Activity:
        """What the scheduler does and has done lately."""
        return self._pipeline.scheduler.activity()

    def recent_batches(self) -> dict[int, int]:
        """How many batches of each size, padding not counted, ran in the last minute."""
        return self._metrics.recent_batches.counts()

    def loaded_bytes(self) -> dict[str, int]:
        """The measured memory of each model that is loaded, in all its versions."""
        sizes = Counter[str]()
        for resident in self._registry.loaded():
            sizes[resident.executable.stored.id] += resident.memory_bytes
        return sizes

    def collect_metrics(self) -> None:
        """Bring the gauges up to date; call before they are read."""
        metrics, activity, sizes = self._metrics, self.activity(), self.loaded_bytes()
        metrics.report_queues({model: depth._asdict() for model, depth in activity.depths().items()})
        metrics.instances.set(len(activity.instances))
        metrics.instances_busy.set(activity.busy)
        metrics.models_loaded.set(len(self._registry.loaded()))
        metrics.report(metrics.model_memory_bytes, {(model,): size for model, size in sizes.items()})
        self._report_models()
        metrics.models_budget_bytes.set(self.options.budget.bytes or inf)
        metrics.report(metrics.gpu_memory_bytes, gpu_memory(self.options.devices))
        metrics.report(metrics.gpu_utilization, gpu_utilization(self.options.devices))
        metrics.memory_limit_bytes.set(self.memory.limit)
        for what, count in self.memory.reserved().items():
            metrics.memory_reserved_bytes.labels(what).set(count)

    def _report_models(self) -> None:
        self._metrics.report_states([(each.id, each.version, each.state) for each in self._registry.all()])
        loaded = [each.executable for each in self._registry.loaded()]
        info: dict[Labels, float] = {
            (each.stored.id, each.stored.version, each.report.precision, each.report.device): 1.0 for each in loaded
        }
        self._metrics.report(self._metrics.model_info, info)

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
        """Why the model called `name` would not answer, or is not loaded though it is to be preloaded."""
        preloading = name in self._preloading
        try:
            model = await self.model(name)
        except ServiceError as error:
            pulled = isinstance(error, WeightsUnavailable) and self._catalog.pulls.can(name)
            return [] if pulled and not preloading else [f"{name}: {error}"]
        if model.failure:
            return [f"{name}: {model.failure}"]
        if reason := self._registry.distrusted(name):
            return [f"{name}: it is loaded anew, as a canary image showed that its answers were wrong: {reason}"]
        waiting = preloading and model.state != "ready"
        return [f"{name}: {model.state}, to be loaded before the service is ready"] if waiting else []

    def _default(self, default_size: DefaultSize, card: ModelCard) -> Size | None:
        size = default_size(card)
        return size if size and max(size) <= self.options.max_input_side else None

    def _check_size(self, size: Size | None) -> None:
        most = self.options.max_input_side
        if size and max(size) > most:
            raise InvalidRequest(f"size {size[0]}x{size[1]}: PVT_MAX_INPUT_SIDE allows sides of up to {most} pixels")

    def _reserve_maps(self, executable: Executable, size: Size | None, images: int, held: Reservation | None) -> None:
        """Let `held` grow by the bytes that the stage maps of so many images take, and what is kept beside them."""
        height, width = size or (executable.height, executable.width)
        needed = 4 * images * VARIANTS[executable.stored.variant].map_numbers(height, width)
        if needed > (most := self.options.max_map_bytes):
            raise InvalidRequest(
                f"the stage maps of {images} images at {height}x{width} take {needed / 1e6:.1f} MB, PVT_MAX_MAPS_MB "
                f"allows {most / 1e6:g}; send {most * images // needed} images a request at the most, or ask for a "
                "smaller size"
            )
        if held:
            # The pixels of each, and the maps of one, scaled to length 1 or in another type.
            held.grow(needed + needed // max(1, images) + images * height * width * 3 + ANSWER_BYTES)


# Classes rather than generators: every request enters both, and a generator costs several times as much.
class _Counted(AbstractContextManager[None]):
    """See `Engine.request`."""

    __slots__ = ("_engine", "_task")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Mutable state: what is counted from here on; None in a context that is within another one.
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> None:
        task, engine = asyncio.current_task(), self._engine
        if task is None or task in engine._requests:  # noqa: SLF001  of this module
            return
        if engine.draining:
            raise ShuttingDown("the service is shutting down and takes no new work; send the request again")
        engine._requests.add(task)  # noqa: SLF001
        self._task = task

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is None:
            return
        self._engine._requests.discard(self._task)  # noqa: SLF001
        if isinstance(error, asyncio.CancelledError) and self._engine._aborted:  # noqa: SLF001
            self._task.uncancel()
            raise ShuttingDown("the service stopped before this request was answered; send it again") from None


class TimeLimit:
    """Limits the time of one request; entering the context returns its deadline, on `monotonic`.

    Leaving it raises:
        DeadlineExceeded: the time is over.
    """

    __slots__ = ("_scope", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._scope = asyncio.timeout(seconds)

    async def __aenter__(self) -> float:
        """See the class."""
        await self._scope.__aenter__()
        return monotonic() + self._seconds

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See the class."""
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise _late(self._seconds) from late


def _late(seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"no answer within {seconds * 1000:.0f} ms; allow more with timeout_ms or PVT_TIMEOUT_MS")
