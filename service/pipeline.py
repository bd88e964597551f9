"""The way of an image through a loaded model: decoded on a thread, queued, run in a batch."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.answers.outputs import Outputs
from service.answers.results import Inferred, Timing
from service.errors import DeviceFailed, ImageTooLarge, InvalidImage, ServiceError
from service.execution.executable import Executable
from service.images.decoding import Decoded, decode
from service.machine.workers import Workers
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.scheduling.activity import Activity, Stats
from service.scheduling.lanes import Lane
from service.scheduling.scheduler import Scheduler

# An encoded picture; pixels (height, width, 3) in the model's own size; or the error that reading it already gave.
Image = bytes | NDArray[np.uint8] | ServiceError


class _Source(NamedTuple):
    """What comes in, and whether its stage maps are wanted."""

    image: bytes | NDArray[np.uint8]
    stages: bool


class _Prepared(NamedTuple):
    """What decoding makes of it."""

    decoded: Decoded
    stages: bool


class _Seen(NamedTuple):
    """What one picture gave, as the model saw it."""

    decoded: Decoded
    outputs: Outputs


@dataclass(frozen=True, slots=True, eq=False)
class Sized:
    """A loaded model at one input size, and its way into the scheduler."""

    executable: Executable
    lane: Lane[_Source, _Prepared, _Seen]

    @property
    def id(self) -> str:
        """The model's name."""
        return self.executable.stored.id


class Pipeline:
    """The scheduler, and what its threads do for each model. It lives until it is closed."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics) -> None:
        self._options = options
        self._metrics = metrics
        # Mutable state: why no GPU is to be expected to work any more, once one has failed.
        self._failed = ""
        self._scheduler = Scheduler[_Source, _Prepared, _Seen](
            options.instances,
            metrics,
            decoders=options.cores,
            max_delay_seconds=options.max_batch_delay_seconds,
        )

    async def close(self, *, wait: bool) -> None:
        """Finish what is queued and end the threads; without `wait`, give up both."""
        await self._scheduler.close(wait=wait)

    def open(self, executable: Executable) -> Sized:
        """Give `executable` its lane."""
        height, width, options = executable.height, executable.width, self._options
        geometry = replace(executable.card.preprocessing.geometry, height=height, width=width)

        def prepare(source: _Source) -> _Prepared:
            if isinstance(source.image, np.ndarray):
                return _Prepared(_as_it_is(source.image, height, width), source.stages)
            pixels, scaled = options.max_image_pixels, options.scaled_jpeg
            return _Prepared(decode(source.image, geometry, max_pixels=pixels, scaled_jpeg=scaled), source.stages)

        def run(instance: int, payloads: Sequence[_Prepared], *, alone: bool) -> Sequence[_Seen]:
            stages = any(each.stages for each in payloads)  # one forward for all of them
            pixels = [each.decoded.pixels for each in payloads]
            try:
                outputs = executable.run(instance, pixels, alone=alone, stages=stages)
            except DeviceFailed as error:
                self._failed = str(error)
                raise
            return [
                _Seen(each.decoded, out if each.stages else out._replace(stages=()))
                for each, out in zip(payloads, outputs, strict=True)
            ]

        model = executable.stored.id
        name = model if executable.own_size else f"{model} at {height}x{width}"
        lane = self._scheduler.open_lane(name, executable.plan, prepare, run, options.queue_size, model=model)
        return Sized(executable, lane)

    def replan(self, sized: Sized) -> None:
        """Take over the batch plan of its executable, which has changed."""
        self._scheduler.replan(sized.lane, sized.executable.plan)

    async def shut(self, sized: Sized) -> None:
        """Take its lane away; no image may be on it, but for callers that have gone. Returns when no thread uses it."""
        await self._scheduler.close_lane(sized.lane)

    async def infer(
        self, sized: Sized, images: Sequence[Image], deadline: float, *, stages: bool = False
    ) -> list[Inferred | ServiceError]:
        """Each of `images` through the model; one that fails does not harm the others. `stages` asks for stage maps.

        Raises:
            QueueFull: the model's queue has not that many places left; nothing was done.
            DeadlineExceeded: what is queued keeps these images from being answered by `deadline`; nothing was done.
        """
        with self._scheduler.places(sized.lane, len(images), deadline):
            if len(images) == 1:
                return [await self._infer_one(sized, images[0], deadline, stages=stages)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._infer_one(sized, image, deadline, stages=stages)) for image in images]
        return [task.result() for task in tasks]

    def stats(self) -> Stats:
        """The scheduler's present state, in numbers."""
        return self._scheduler.stats()

    def activity(self) -> Activity:
        """The scheduler's present state, in full."""
        return self._scheduler.activity()

    def stalled(self, *others: Workers) -> list[str]:
        """A reason for each kind of thread, `others` too, that has been at one job for longer than options allow.

        And one for a GPU that failed.
        """
        busy = self._scheduler.stalled_seconds() | {workers.name: workers.stalled_seconds() for workers in others}
        return [self._failed] * bool(self._failed) + [
            f"a thread for {name} has been at one job for {seconds:.0f} s"
            for name, seconds in busy.items()
            if seconds > self._options.stall_seconds
        ]

    async def _infer_one(self, sized: Sized, image: Image, deadline: float, *, stages: bool) -> Inferred | ServiceError:
        if isinstance(image, ServiceError):
            self._count(sized, "refused")
            return image
        try:
            inferred = await self._through(sized, _Source(image, stages), deadline)
        except asyncio.CancelledError:
            self._count(sized, "cancelled")
            raise
        except (InvalidImage, ImageTooLarge) as error:
            self._count(sized, "refused")
            return error
        except ServiceError as error:
            self._count(sized, "failed")
            return error
        except Exception:
            self._count(sized, "failed")
            raise
        self._count(sized, "answered")
        return inferred

    async def _through(self, sized: Sized, source: _Source, deadline: float) -> Inferred:
        completed = await self._scheduler.submit(sized.lane, source, deadline)
        timing = Timing(completed.decode_seconds, completed.queue_seconds, completed.run_seconds)
        for stage, seconds in zip(("decode", "queue", "infer"), timing, strict=True):
            self._metrics.stage_seconds.labels(stage, sized.id).observe(seconds)
        decoded, outputs = completed.result
        return Inferred(decoded.width, decoded.height, outputs, timing, decoded.pixels)

    def _count(self, sized: Sized, outcome: str) -> None:
        self._metrics.images.labels(sized.id, outcome).inc()


def _as_it_is(pixels: NDArray[np.uint8], height: int, width: int) -> Decoded:
    if pixels.dtype != np.uint8 or pixels.shape != (height, width, 3):
        raise InvalidImage(f"pixels are {pixels.dtype} {pixels.shape}; the model takes uint8 ({height}, {width}, 3)")
    return Decoded(np.ascontiguousarray(pixels), width, height)
