"""The way of an image through a loaded model: decoded on a thread, queued, run in a batch."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from threading import Condition, Timer
from time import monotonic
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from service.backends.base import DeviceHealth
from service.content_cache import CacheUse, ContentCache, Ended, Outcome, Work, owned
from service.errors import ImageTooLarge, InvalidImage, MemoryExhausted, OutOfMemory, ServiceError
from service.execution.executable import Executable
from service.execution.plan import BatchPlan
from service.images.costs import Cost
from service.images.decoding import Decoded, decode
from service.images.geometry import Geometry
from service.images.header import megapixels
from service.machine import trim
from service.memory import DECODING, MODELS, MemoryBudget
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.results import Image, ImageResult, Outputs, Pixels, Timing
from service.scheduling.lanes import LARGE_MEGAPIXELS, Completed, Lane, Places
from service.scheduling.scheduler import Scheduler
from service.tracing import BatchTracer, ImageTrace, submitted

_LEFT_TO_ANSWER = 0.1  # of the time of a request
_TRIM_SECONDS = 1.0  # after the last large image
_LOOK_AGAIN_SECONDS = 0.1  # what others free wakes nobody
_CHECK_SECONDS = 0.001
T = TypeVar("T")


class _Source(NamedTuple):
    """An image of a request, whether its stage maps are requested, and until when, on `monotonic`, it is of use."""

    image: bytes | Pixels
    stages: bool
    deadline: float
    trace: ImageTrace | None


class _Prepared(NamedTuple):
    """`waited_seconds`: how much of decoding was waiting for memory."""

    decoded: Decoded
    stages: bool
    waited_seconds: float = 0.0
    trace: ImageTrace | None = None


_Inferred = tuple[_Prepared, Outputs]
_Places = Places[_Source, _Prepared, _Inferred]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Sized:
    """A loaded model at one input size, and its lane through the scheduler; no other one has its `number`."""

    executable: Executable
    lane: Lane[_Source, _Prepared, _Inferred]
    number: int = field(default_factory=count().__next__)


class LargeImages:
    """Memory for large images while they are decoded, one after another. Thread-safe.

    Once none has been decoded for a second, what the allocator kept of their memory is returned to the kernel.
    """

    def __init__(self, memory: MemoryBudget) -> None:
        self._memory = memory
        # Mutable state, under the condition: whether one is being decoded, and what will trim when it is long ago.
        self._free = Condition()
        self._busy = False
        self._trimming: Timer | None = None

    @contextmanager
    def reserved(self, deadline: float, cost: Cost, waits: list[float] | None = None) -> Iterator[None]:
        """Hold the memory that `cost` names while the context lasts; at once where that is little.

        How long it was waited for, in seconds, is appended to `waits`.

        Raises:
            MemoryExhausted: there is never so much, or not by `deadline`, on `monotonic`.
        """
        if not cost.large:  # there is one on each thread at the most, and memory for these is never given away
            yield
            return
        start = monotonic()
        self._memory.require_possible(cost.bytes, DECODING, beside=MODELS)
        deadline -= _LEFT_TO_ANSWER * (deadline - monotonic())
        with self._free:
            while self._busy and (left := deadline - monotonic()) > 0:
                self._free.wait(left)
            while not (held := None if self._busy else self._memory.try_reserve(cost.bytes, DECODING)):
                if (left := deadline - monotonic()) <= 0:
                    raise MemoryExhausted(
                        f"decoding the image takes {cost.bytes / 1e6:.0f} MB, which were not free in time: large "
                        "images are decoded one after another; send it again, or smaller",
                        retry_after_seconds=1.0,
                    )
                self._free.wait(min(left, _LOOK_AGAIN_SECONDS))
            self._busy = True
        if waits is not None:
            waits.append(monotonic() - start)
        try:
            yield
        finally:
            with self._free:
                held.release()
                self._busy = False
                self._free.notify()
                self._trim_later()

    def _trim_later(self) -> None:
        """Under the condition. Pillow's blocks of 16 MB are below glibc's threshold for memory that is unmapped."""
        if self._trimming:
            self._trimming.cancel()
        self._trimming = Timer(_TRIM_SECONDS, trim)
        self._trimming.daemon = True
        self._trimming.start()


class Pipeline:
    """The scheduler, and the work of its threads for each model. It lives until the scheduler is closed."""

    def __init__(
        self,
        options: EngineOptions,
        metrics: EngineMetrics,
        devices: DeviceHealth,
        memory: MemoryBudget,
        cache: ContentCache | None = None,
        *,
        trace_batch: BatchTracer | None = None,
    ) -> None:
        """`trace_batch`: runs each batch of which an image is traced; None where no request ever is."""
        self._options = options
        self._cache = cache
        self._trace_batch = trace_batch
        self._large = LargeImages(memory)
        self._metrics = metrics
        self._devices = devices
        self.scheduler = Scheduler[_Source, _Prepared, _Inferred](
            options.instances, metrics, decoders=options.cores, max_delay_seconds=options.max_batch_delay_seconds
        )
        # Its plan is there for the form: nothing waits behind it, and one at a time is admitted.
        plan = BatchPlan({1: _CHECK_SECONDS})
        check: Lane[Any, Any, Any] = Lane("check", plan, lambda function: function, self._run_checks, 1, internal=True)
        self._checks = self.scheduler.open_lane(check)

    def open(self, executable: Executable) -> Sized:
        """Open a lane for `executable`."""
        height, width, model = executable.height, executable.width, executable.stored.id
        geometry = replace(executable.card.preprocessing.geometry, height=height, width=width)
        # What is not traced takes no step for the sake of what is.
        decode = self._decode if self._trace_batch is None else self._decode_traced
        run = self._run if self._trace_batch is None else partial(self._run_traced, self._trace_batch)
        lane = Lane(
            model if executable.own_size else f"{model} at {height}x{width}",
            executable.plan,
            partial(decode, geometry),
            partial(run, executable),
            self._options.queue_size,
            model,
        )
        return Sized(executable, self.scheduler.open_lane(lane))

    async def close(self, sized: Sized) -> None:
        """Close the lane of `sized`, which no request uses, and drop its results."""
        if self._cache:
            await self._cache.forget(sized.number)
        await self.scheduler.close_lane(sized.lane)

    def _decode(self, geometry: Geometry, source: _Source) -> _Prepared:
        image, shape = source.image, (geometry.height, geometry.width, 3)
        if not isinstance(image, np.ndarray):
            most, scaled = self._options.max_image_pixels, self._options.scaled_jpeg
            waits: list[float] = []
            reserve = partial(self._large.reserved, source.deadline, waits=waits)
            decoded = decode(image, geometry, max_pixels=most, scaled_jpeg=scaled, reserve=reserve)
            return _Prepared(decoded, source.stages, sum(waits))
        if image.dtype != np.uint8 or image.shape != shape:
            raise InvalidImage(f"pixels are {image.dtype} {image.shape}; the model takes uint8 {shape}")
        return _Prepared(Decoded(np.ascontiguousarray(image), geometry.width, geometry.height), source.stages)

    def _decode_traced(self, geometry: Geometry, source: _Source) -> _Prepared:
        if not (trace := source.trace):
            return self._decode(geometry, source)
        trace.decoding = monotonic()
        prepared = self._decode(geometry, source)._replace(trace=trace)
        trace.decoded = monotonic()
        return prepared

    def _run(
        self, executable: Executable, instance: int, payloads: Sequence[_Prepared], *, alone: bool
    ) -> list[_Inferred]:
        stages = any(each.stages for each in payloads)  # one forward for all of them
        try:
            with self._devices.watched():
                pixels = [each.decoded.pixels for each in payloads]
                ran = partial(self._metrics.graph_ran, executable.stored.id)
                outputs = executable.run(instance, pixels, alone=alone, stages=stages, ran=ran)
        except MemoryError as error:
            raise OutOfMemory(f"the outputs of a batch of {len(payloads)} do not fit into memory") from error
        inferred = [
            (each, output if each.stages else output._replace(stages=()))
            for each, output in zip(payloads, outputs, strict=True)
        ]
        return [(each, owned(output)) for each, output in inferred] if self._cache else inferred

    def _run_traced(
        self,
        trace_batch: BatchTracer,
        executable: Executable,
        instance: int,
        payloads: Sequence[_Prepared],
        *,
        alone: bool,
    ) -> list[_Inferred]:
        images = [each.trace for each in payloads if each.trace]
        if not images:
            return self._run(executable, instance, payloads, alone=alone)
        stored, report = executable.stored, executable.report
        what: dict[str, str | int] = {"model": stored.id, "version": stored.version, "batch_size": len(payloads)}
        what |= {"instance": instance, "device": report.device, "precision": report.precision}
        with trace_batch(images, what):
            return self._run(executable, instance, payloads, alone=alone)

    async def on_instance(self, check: Callable[[int], T]) -> T:
        """What `check` returns for the number of an instance, which runs nothing else meanwhile.

        Raises:
            QueueFull, ShuttingDown: another check is under way, or the service ends.
            Exception: what `check` raises.
        """
        with self.scheduler.reserve(self._checks, 1) as places:
            completed = await self.scheduler.submit(places, cast("Any", check))
        return cast("T", completed.result)

    def _run_checks(self, instance: int, payloads: Sequence[Callable[[int], object]], *, alone: bool) -> list[object]:  # noqa: ARG002
        with self._devices.watched():
            return [check(instance) for check in payloads]

    async def infer(
        self,
        sized: Sized,
        images: Sequence[Image],
        deadline: float,
        *,
        stages: bool = False,
        client: str = "",
        cache: CacheUse | None = None,
    ) -> list[Outcome]:
        """Each of `images` through the model, with stage maps if `stages`; one that fails does not harm the others.

        `client` shares the model fairly with others. What the content cache answers needs no place in
        the queue; `cache` says how it is used, None: not at all.

        Raises:
            QueueFull: the model's queue has not that many places left; nothing was done.
            DeadlineExceeded: what is queued keeps these images from being answered by `deadline`; nothing was done.
        """
        if self._cache is None or cache is None or not (cache.lookup or cache.store):
            return await self._compute(sized, images, deadline, stages=stages, client=client)

        async def compute(own: Sequence[int], ended: Ended) -> None:
            def ended_one(i: int, outcome: Outcome) -> None:
                ended(own[i], outcome)

            chosen = [images[i] for i in own]
            await self._compute(sized, chosen, deadline, stages=stages, client=client, ended=ended_one)

        def may_join(other: str) -> bool:  # not one that stands behind a queue of its client's own
            return self.scheduler.waiting(sized.lane, other) <= sized.lane.plan.largest

        work = Work(sized.executable.stored.id, sized.number, stages, client, compute, may_join)
        return await self._cache.infer(images, work, cache)

    async def _compute(
        self,
        sized: Sized,
        images: Sequence[Image],
        deadline: float,
        *,
        stages: bool,
        client: str,
        ended: Ended = lambda *_: None,
    ) -> list[Outcome]:
        """As `infer`, without the cache; `ended` is called with the index and outcome of each image as it ends."""
        most = self._options.max_image_pixels / 1e6  # a broken header may name any size, and takes no time to refuse
        sizes = [min(most, megapixels(image)) if isinstance(image, bytes) else 0.0 for image in images]
        large = sum(size > LARGE_MEGAPIXELS for size in sizes)
        with self.scheduler.reserve(sized.lane, len(images), deadline, client, large) as places:

            async def infer_one(i: int) -> Outcome:
                outcome = await self._infer_one(sized, places, deadline, images[i], sizes[i], stages=stages)
                ended(i, outcome)
                return outcome

            if len(images) == 1:
                return [await infer_one(0)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(infer_one(i)) for i in range(len(images))]
        return [task.result() for task in tasks]

    async def _infer_one(
        self, sized: Sized, places: _Places, deadline: float, image: Image, megapixels: float, *, stages: bool
    ) -> Outcome:
        model, outcome, start = sized.executable.stored.id, "failed", monotonic()
        trace: ImageTrace | None = None
        try:
            if isinstance(image, ServiceError):
                outcome = "refused"
                return image
            if self._trace_batch:
                trace = submitted(start)
            source = _Source(image, stages, deadline, trace)
            completed = await self.scheduler.submit(places, source, deadline, megapixels)
            outcome = "answered"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except ServiceError as error:
            if isinstance(error, InvalidImage | ImageTooLarge):
                outcome = "refused"
            return error
        finally:
            self._metrics.images.labels(model, outcome).inc()
            if outcome != "answered":
                self._metrics.failed_seconds.labels(model).inc(monotonic() - start)
            if trace:
                trace.ended = monotonic()
        return self._result(model, completed)

    def _result(self, model: str, completed: Completed[_Inferred]) -> ImageResult:
        (decoded, _, waited, trace), outputs = completed.result
        timing = Timing(
            wait=completed.wait_seconds + waited,
            decode=completed.decode_seconds - waited,
            queue=completed.queue_seconds,
            infer=completed.run_seconds,
        )
        for stage, seconds in zip(Timing._fields, timing, strict=True):
            self._metrics.stage_seconds.labels(stage, model).observe(seconds)
        if trace:
            trace.timing, trace.batch_began = timing, completed.began
        batch = completed.batch_size, completed.reason
        return ImageResult(decoded.width, decoded.height, outputs, timing, decoded.pixels, *batch)
