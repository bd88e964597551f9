"""The facade: image bytes in, results out. The one thing of `service` that HTTP talks to."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Self

import structlog

from service.activity import Activity
from service.errors import DeadlineExceeded, ServiceError, ShuttingDown
from service.loading import Loading
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.pipeline import Image, Pipeline, Resident
from service.registry import Registry, Status
from service.results import Health, Predictions, prediction
from service.store import Store, StoredModel
from service.workers import Workers

log = structlog.get_logger(component="engine")


STORE_SECONDS = 2.0  # a store on a network that takes longer to list its cards is no good to serve from
PRELOAD_AGAIN_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model of the store, and where it stands in memory."""

    stored: StoredModel
    default: bool
    status: Status[Resident]


class Engine:
    """Use as an async context manager: leaving it finishes what is under way."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics) -> None:
        self.options = options
        self._metrics = metrics
        self._loading = Loading(options, metrics)
        self._store = Store(options.model_store)
        self._files = Workers("store", 1)
        self._pipeline = Pipeline(options, metrics)
        self._registry = Registry[Resident](self._find, self._load)
        # Mutable state: work that no request waits for, requests under way, whether new ones are refused, and whether
        # those under way are given up.
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way: set[asyncio.Task[object]] = set()
        self.draining = False
        self._aborted = False

    async def __aenter__(self) -> Self:
        for name in {self.options.default_model} - {*self.options.preload}:
            for reason in await self._unready(name):
                log.warning("default_model_unavailable", reason=reason)
        for name in self.options.preload:
            self._background(self._preload(name))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._registry.close()
        await self._pipeline.close(wait=not self._aborted)
        self._loading.close()
        self._files.close(wait=False)

    async def drain(self) -> None:
        """Refuse new requests from now on and wait for those under way."""
        self.draining = True
        while self._under_way:
            await asyncio.wait(self._under_way)

    def abort(self) -> None:
        """Refuse those under way too: whoever waits gets `ShuttingDown` at once."""
        self.draining = self._aborted = True
        for task in self._under_way:
            task.cancel()

    @contextmanager
    def request(self) -> Iterator[None]:
        """What `drain` waits for: enter it before reading a request's body, so that an upload is not cut off.

        Raises:
            ShuttingDown: the engine takes no new work, or has just given this one up.
        """
        task = asyncio.current_task()
        if task is None or task in self._under_way:
            yield
            return
        if self.draining:
            raise ShuttingDown("the service is shutting down and takes no new work; send the request again")
        self._under_way.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._aborted:
                raise
            task.uncancel()
            raise ShuttingDown("the service stopped before this request was answered; send it again") from None
        finally:
            self._under_way.discard(task)

    async def predict(
        self, images: Sequence[Image], *, model: str | None = None, top_k: int = 5, timeout_seconds: float | None = None
    ) -> Predictions:
        """The `top_k` best classes of each of `images`.

        Raises:
            InvalidRequest: more images than the model's queue ever takes.
            ModelNotFound, WeightsUnavailable, ModelLoadFailed: `model` can't be had.
            QueueFull: too many images wait for that model already.
            DeadlineExceeded: `timeout_seconds` passed.
            ShuttingDown: the engine takes no new work.
        """
        name = self.options.default_model if model is None else model
        with self.request():
            async with self._deadline(timeout_seconds) as deadline, self._registry.lease(name) as resident:
                inferred = await self._pipeline.infer(resident, images, deadline)
        card, version = resident.executable.card, resident.executable.stored.version
        return Predictions(card.id, version, [prediction(each, card.labels, top_k) for each in inferred])

    def encoded(self, predictions: Predictions, seconds: float) -> None:
        """Take note that writing `predictions` out took `seconds`."""
        self._metrics.stage_seconds.labels("encode", predictions.model).observe(seconds)

    async def models(self) -> list[ModelStatus]:
        """Every model of the store, and every other that is loaded.

        Raises:
            WeightsUnavailable: the store can't be read.
        """
        default = await self._default_id()
        found = {stored.id: stored for stored in await self._files.run(self._store.models)}
        known = found | {resident.id: resident.executable.stored for resident in self._registry.loaded()}
        return [self._status(stored, default) for _, stored in sorted(known.items())]

    async def model(self, name: str) -> ModelStatus:
        """The model called `name`.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has none.
        """
        return self._status(await self._find(name), await self._default_id())

    def live(self) -> Health:
        """Live while the threads move; says nothing of readiness, and asks no disk."""
        stalled = self._pipeline.stalled(self._files)
        return Health(live=not stalled, ready=not stalled, reasons=stalled)

    async def health(self) -> Health:
        """Live, and ready when the default model and what is preloaded answer, or would if asked."""
        live = self.live()
        reasons = [*live.reasons, *(["the service is shutting down"] if self.draining else [])]
        try:
            async with asyncio.timeout(STORE_SECONDS):
                for name in dict.fromkeys((self.options.default_model, *self.options.preload)):
                    reasons.extend(await self._unready(name))
        except TimeoutError:
            reasons.append(f"the model store has not answered for {STORE_SECONDS:.0f} s")
        return Health(live=live.live, ready=not reasons, reasons=reasons)

    def activity(self) -> Activity:
        """What the scheduler is doing and has done lately."""
        return self._pipeline.activity()

    def collect_metrics(self) -> None:
        """Bring the gauges up to date; call before they are read."""
        stats = self._pipeline.stats()
        for name, waiting in stats.waiting.items():
            self._metrics.queue_depth.labels(name).set(waiting)
        self._metrics.instances.set(stats.instances)
        self._metrics.instances_busy.set(stats.busy_instances)
        self._metrics.models_loaded.set(len(self._registry.loaded()))

    @asynccontextmanager
    async def _deadline(self, timeout_seconds: float | None) -> AsyncIterator[float]:
        """The time one request has; yields when it ends, on `monotonic`."""
        seconds = timeout_seconds or self.options.timeout_seconds
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                yield monotonic() + seconds
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceeded(
                f"no answer within {seconds * 1000:.0f} ms; allow more with timeout_ms or PVT_TIMEOUT_MS"
            ) from error

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
        return await self._files.run(self._store.find, name)

    async def _default_id(self) -> str | None:
        try:
            return (await self._find(self.options.default_model)).id
        except ServiceError:
            return None

    def _status(self, stored: StoredModel, default: str | None) -> ModelStatus:
        """What runs counts, not what has become of its folder since."""
        status = self._registry.status(stored.id)
        return ModelStatus(status.loaded.executable.stored if status.loaded else stored, stored.id == default, status)

    async def _load(self, stored: StoredModel) -> Resident:
        executable = await self._loading.load(stored)
        self._background(self._loading.widen(executable))
        return self._pipeline.open(executable)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unready(self, name: str) -> list[str]:
        try:
            model = await self.model(name)
        except ServiceError as error:
            return [f"{name}: {error}"]
        if failure := model.status.failure or model.stored.failure:
            return [f"{name}: {failure}"]
        waits = name in self.options.preload and model.status.state != "ready"
        return [f"{name}: {model.status.state}, to be loaded before the service is ready"] if waits else []
