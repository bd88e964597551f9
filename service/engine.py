"""The facade: image bytes in, results out. The one thing of `service` that HTTP talks to."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Self

from service.activity import Activity
from service.metrics import EngineMetrics
from service.models import Models
from service.options import EngineOptions
from service.pipeline import Image, Pipeline
from service.requests import Requests, time_limit
from service.results import Health, Predictions, prediction


class Engine:
    """Use as an async context manager: leaving it finishes what is under way."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics) -> None:
        self.options = options
        self._metrics = metrics
        self._pipeline = Pipeline(options, metrics)
        self.models = Models(options, metrics, self._pipeline)
        self._requests = Requests()

    async def __aenter__(self) -> Self:
        await self.models.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain()
        await self.models.stop()
        await self._pipeline.close(wait=not self._requests.aborted)
        self.models.close()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._requests.draining

    async def drain(self) -> None:
        """Refuse new requests from now on and wait for those under way."""
        await self._requests.drain()

    def abort(self) -> None:
        """Refuse those under way too: whoever waits gets `ShuttingDown` at once."""
        self._requests.abort()

    def request(self) -> AbstractContextManager[None]:
        """What `drain` waits for: enter it before reading a request's body, so that an upload is not cut off.

        Raises:
            ShuttingDown: the engine takes no new work, or has just given this one up.
        """
        return self._requests.one()

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
        with self.request():
            async with self._time_limit(timeout_seconds) as deadline, self.models.lease(model) as resident:
                inferred = await self._pipeline.infer(resident, images, deadline)
        card, version = resident.executable.card, resident.executable.stored.version
        return Predictions(card.id, version, [prediction(each, card.labels, top_k) for each in inferred])

    def encoded(self, predictions: Predictions, seconds: float) -> None:
        """Take note that writing `predictions` out took `seconds`."""
        self._metrics.stage_seconds.labels("encode", predictions.model).observe(seconds)

    def live(self) -> Health:
        """Live while the threads move; says nothing of readiness, and asks no disk."""
        stalled = self.models.stalled()
        return Health(live=not stalled, ready=not stalled, reasons=stalled)

    async def health(self) -> Health:
        """Live, and ready when the default model and what is preloaded answer, or would if asked."""
        live = self.live()
        reasons = [*live.reasons, *(["the service is shutting down"] if self.draining else [])]
        reasons += await self.models.unready()
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
        self._metrics.models_loaded.set(len(self.models.loaded()))

    def _time_limit(self, seconds: float | None) -> AbstractAsyncContextManager[float]:
        return time_limit(seconds or self.options.timeout_seconds)
