"""The facade: image bytes in, results out. The one thing of `service` that HTTP talks to."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from time import monotonic, perf_counter
from types import TracebackType
from typing import Self

import structlog

from service.errors import DeadlineExceeded, InvalidRequest, ModelLoadFailed, ServiceError, ShuttingDown
from service.loader import load
from service.metrics import EngineMetrics
from service.options import EngineOptions, make_backend
from service.outputs import top_k as best_classes
from service.pipeline import Image, Pipeline, Resident
from service.registry import Registry, Status
from service.results import Health, Inferred, Prediction, Predictions
from service.store import Store, StoredModel
from service.workers import Workers

log = structlog.get_logger(component="engine")


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
        self._backend = make_backend(options)
        self._store = Store(options.model_store)
        self._loaders = Workers("load", 1)
        self._files = Workers("store", 1)
        self._pipeline = Pipeline(options, self._backend, metrics)
        self._registry = Registry[Resident](self._find, self._load)
        # Mutable state: what closes with the engine, requests under way, and whether new ones are refused.
        self._stack = AsyncExitStack()
        self._under_way: set[asyncio.Task[object]] = set()
        self.draining = False

    async def __aenter__(self) -> Self:
        self._stack.callback(self._files.close)
        self._stack.callback(self._loaders.close)
        await self._stack.enter_async_context(self._pipeline)
        self._stack.push_async_callback(self._registry.close)
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        for name in self.options.preload:
            group.create_task(self._preload(name))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain()
        await self._stack.aclose()

    async def drain(self) -> None:
        """Refuse new requests from now on and wait for those under way."""
        self.draining = True
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def predict(
        self, images: Sequence[Image], *, model: str | None = None, top_k: int = 5, timeout_seconds: float | None = None
    ) -> Predictions:
        """The `top_k` best classes of each of `images`.

        Raises:
            InvalidRequest: no image, or more than a request may carry.
            ModelNotFound, WeightsUnavailable, ModelLoadFailed: `model` can't be had.
            QueueFull: too many images wait for that model already.
            DeadlineExceeded: `timeout_seconds` passed.
            ShuttingDown: the engine takes no new work.
        """
        if not images:
            raise InvalidRequest("the request carries no image")
        if len(images) > self.options.max_images:
            raise InvalidRequest(
                f"{len(images)} images in one request; PVT_MAX_IMAGES allows {self.options.max_images}"
            )
        name = model or self.options.default_model
        async with self._deadline(timeout_seconds) as deadline, self._registry.lease(name) as resident:
            inferred = await self._pipeline.infer(resident, images, deadline)
        card, version = resident.executable.card, resident.executable.stored.version
        return Predictions(card.id, version, [_predict(each, card.labels, top_k) for each in inferred])

    def encoded(self, predictions: Predictions, seconds: float) -> None:
        """Take note that writing `predictions` out took `seconds`."""
        self._metrics.stage_seconds.labels("encode", predictions.model).observe(seconds)

    async def models(self) -> list[ModelStatus]:
        """Every model of the store.

        Raises:
            WeightsUnavailable: the store can't be read.
        """
        default = await self._default_id()
        stored = await self._files.run(self._store.models)
        return [ModelStatus(each, each.id == default, self._registry.status(each.id)) for each in stored]

    async def model(self, name: str) -> ModelStatus:
        """The model called `name`.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has none.
        """
        stored = await self._find(name)
        return ModelStatus(stored, stored.id == await self._default_id(), self._registry.status(stored.id))

    async def health(self) -> Health:
        """Live while the threads move; ready when the default model and what is preloaded answer, or would if asked."""
        stalled = self._pipeline.stalled()
        reasons = [*stalled]
        if self.draining:
            reasons.append("the service is shutting down")
        for name in dict.fromkeys((self.options.default_model, *self.options.preload)):
            reasons.extend(await self._unready(name))
        return Health(live=not stalled, ready=not reasons, reasons=reasons)

    def collect_metrics(self) -> None:
        """Bring the gauges up to date; call before they are read."""
        stats = self._pipeline.stats()
        for name, waiting in stats.waiting.items():
            self._metrics.queue_depth.labels(name).set(waiting)
        self._metrics.instances_busy.set(stats.busy_instances)
        self._metrics.models_loaded.set(len(self._registry.loaded()))

    @asynccontextmanager
    async def _deadline(self, timeout_seconds: float | None) -> AsyncIterator[float]:
        """The time one request has; yields when it ends, on `monotonic`."""
        task = asyncio.current_task()
        if self.draining or task is None:
            raise ShuttingDown("the service is shutting down and takes no new work; send the request again")
        seconds = timeout_seconds or self.options.timeout_seconds
        scope = asyncio.timeout(seconds)
        self._under_way.add(task)
        try:
            async with scope:
                yield monotonic() + seconds
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceeded(
                f"no answer within {seconds * 1000:.0f} ms; allow more with timeout_ms or PVT_TIMEOUT_MS"
            ) from error
        finally:
            self._under_way.discard(task)

    async def _preload(self, name: str) -> None:
        try:
            async with self._registry.lease(name):
                pass
        except ServiceError as error:
            log.warning("preload_failed", model=name, reason=str(error))

    async def _find(self, name: str) -> StoredModel:
        return await self._files.run(self._store.find, name)

    async def _default_id(self) -> str | None:
        try:
            return (await self._find(self.options.default_model)).id
        except ServiceError:
            return None

    async def _load(self, stored: StoredModel) -> Resident:
        start = perf_counter()
        try:
            executable = await self._loaders.run(load, stored, self._backend, self.options.max_batch_size)
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
        self._metrics.model_memory_bytes.labels(stored.id).set(report.memory_bytes)
        log.info("model_loaded", model=stored.id, backend=report.backend, precision=report.precision,
                 batch_sizes=executable.plan.sizes, seconds=round(report.load_seconds, 3))  # fmt: skip
        return self._pipeline.open(executable)

    async def _unready(self, name: str) -> list[str]:
        try:
            model = await self.model(name)
        except ServiceError as error:
            return [f"{name}: {error}"]
        if failure := model.status.failure or model.stored.failure:
            return [f"{name}: {failure}"]
        waits = name in self.options.preload and model.status.state != "ready"
        return [f"{name}: {model.status.state}, to be loaded before the service is ready"] if waits else []


def _predict(image: Inferred | ServiceError, labels: Sequence[str], top_k: int) -> Prediction | ServiceError:
    if isinstance(image, ServiceError):
        return image
    classes = best_classes(image.outputs.logits, labels, top_k)
    return Prediction(image.width, image.height, classes, image.timing)
