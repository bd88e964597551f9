"""The facade: image bytes in, results out. The one thing of `service` that HTTP talks to."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self, TypeVar

from service.answers.results import Answered, Health, Predictions, prediction
from service.architecture.variants import VARIANTS
from service.errors import InvalidRequest
from service.execution.executable import Executable
from service.machine.workers import Workers
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.pipeline import Image, Pipeline
from service.registry.models import Models
from service.registry.residents import Size
from service.scheduling.activity import Activity
from service.scheduling.requests import Requests, time_limit
from service.store.cards import ModelCard

T = TypeVar("T")


class Engine:
    """Use as an async context manager: leaving it finishes what is under way."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics) -> None:
        self.options = options
        self._metrics = metrics
        self._pipeline = Pipeline(options, metrics)
        self.models = Models(options, metrics, self._pipeline)
        self._requests = Requests()
        # Two, so that a small answer need not wait for a large one; more would take the event loop's turns.
        self._encoders = Workers("encode", 2)

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
        self._encoders.close(wait=not self._requests.aborted)

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

    def request(self, patience_seconds: float | None = None) -> AbstractContextManager[None]:
        """What `drain` waits for: enter it before reading a request's body, so that an upload is not cut off.

        `patience_seconds` is how long it waits for a model that is not loaded; None leaves that to the options.

        Raises:
            ShuttingDown: the engine takes no new work, or has just given this one up.
        """
        return self._requests.one(patience_seconds)

    async def predict(
        self,
        images: Sequence[Image],
        *,
        model: str | None = None,
        top_k: int = 5,
        size: Size | None = None,
        timeout_seconds: float | None = None,
    ) -> Predictions:
        """The `top_k` best classes of each of `images`; see `infer`."""
        answered = await self.infer(images, model=model, size=size, timeout_seconds=timeout_seconds)
        results = [prediction(each, answered.card.labels, top_k) for each in answered.results]
        return Predictions(answered.card.id, answered.version, results)

    async def infer(
        self,
        images: Sequence[Image],
        *,
        model: str | None = None,
        size: Size | None = None,
        stages: bool = False,
        check: Callable[[ModelCard], None] | None = None,
        timeout_seconds: float | None = None,
    ) -> Answered:
        """All that the model yields for each of `images`; stage maps, and the head's weights, if `stages` says so.

        `size` is the height and width to which pictures are resized, the model's own by default; images that are pixels
        already must have it. `check` gets the model's card before anything is run, and may raise.

        Raises:
            InvalidRequest: no such size; more images than the model's queue ever takes; stage maps that would take more
                memory than a request may.
            ModelNotFound, WeightsUnavailable, ModelLoadFailed, MemoryBudgetExceeded: `model` can't be had.
            ModelLoading: it is not loaded yet, and the request would not wait.
            QueueFull: too many images wait for that model already, or it is in use at too many sizes.
            DeadlineExceeded: `timeout_seconds` passed.
            ShuttingDown: the engine takes no new work.
        """
        self._check(size)
        with self.request():
            async with (
                time_limit(timeout_seconds or self.options.timeout_seconds) as deadline,
                self.models.lease(model, self._requests.patience_seconds) as resident,
            ):
                if check:
                    check(resident.executable.card)
                if stages:
                    self._check_maps(resident.executable, size, len(images))
                async with resident.at(size, stages=stages) as sized:
                    results = await self._pipeline.infer(sized, images, deadline, stages=stages)
                executable = sized.executable
        given = executable.height, executable.width
        return Answered(executable.card, executable.stored.version, given, executable.head if stages else None, results)

    async def encode(self, make: Callable[[], T]) -> T:
        """What `make` turns a large answer into, on a thread for that."""
        return await self._encoders.run(make)

    def encoded(self, model: str, seconds: float) -> None:
        """Take note that writing an answer of `model` out took `seconds`."""
        self._metrics.stage_seconds.labels("encode", model).observe(seconds)

    def live(self) -> Health:
        """Live while the threads move; says nothing of readiness, and asks no disk."""
        stalled = self.models.stalled(self._encoders)
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
        self.models.collect_metrics()

    def _check(self, size: Size | None) -> None:
        most = self.options.max_input_side
        if size and max(size) > most:
            raise InvalidRequest(f"size {size[0]}x{size[1]}: PVT_MAX_INPUT_SIDE allows sides of up to {most} pixels")

    def _check_maps(self, executable: Executable, size: Size | None, images: int) -> None:
        height, width = size or (executable.height, executable.width)
        needed = 4 * images * VARIANTS[executable.stored.variant].map_numbers(height, width)
        if needed > (most := self.options.max_map_bytes):
            raise InvalidRequest(
                f"the stage maps of {images} pictures at {height}x{width} take {needed / 1e6:.1f} MB, PVT_MAX_MAPS_MB "
                f"allows {most / 1e6:g}; send {most * images // needed} pictures a request at the most, or ask for a "
                "smaller size"
            )
