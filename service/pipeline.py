"""The way of an image through a loaded model: decoded on a thread, queued, run in a batch."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from service.backends.base import DeviceHealth
from service.errors import ImageTooLarge, InvalidImage, OutOfMemory, ServiceError
from service.execution.executable import Executable
from service.images.decoding import Decoded, decode
from service.images.geometry import Geometry
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.results import Image, ImageResult, Outputs, Pixels, Timing
from service.scheduling.dispatcher import Lane
from service.scheduling.scheduler import Scheduler


class _Source(NamedTuple):
    """An image of a request, and whether its stage maps are requested."""

    image: bytes | Pixels
    stages: bool


class _Prepared(NamedTuple):
    decoded: Decoded
    stages: bool


_Inferred = tuple[Decoded, Outputs]


@dataclass(frozen=True, slots=True, eq=False)
class Sized:
    """A loaded model at one input size, and its lane through the scheduler."""

    executable: Executable
    lane: Lane[_Source, _Prepared, _Inferred]


class Pipeline:
    """The scheduler, and the work of its threads for each model. It lives until the scheduler is closed."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics, devices: DeviceHealth) -> None:
        self._options = options
        self._metrics = metrics
        self._devices = devices
        self.scheduler = Scheduler[_Source, _Prepared, _Inferred](
            options.instances, metrics, decoders=options.cores, max_delay_seconds=options.max_batch_delay_seconds
        )

    def open(self, executable: Executable) -> Sized:
        """Open a lane for `executable`."""
        height, width, model = executable.height, executable.width, executable.stored.id
        geometry = replace(executable.card.preprocessing.geometry, height=height, width=width)
        lane = Lane(
            model if executable.own_size else f"{model} at {height}x{width}",
            executable.plan,
            partial(self._decode, geometry),
            partial(self._run, executable),
            self._options.queue_size,
            model,
        )
        return Sized(executable, self.scheduler.open_lane(lane))

    def _decode(self, geometry: Geometry, source: _Source) -> _Prepared:
        image, shape = source.image, (geometry.height, geometry.width, 3)
        if not isinstance(image, np.ndarray):
            most, scaled = self._options.max_image_pixels, self._options.scaled_jpeg
            return _Prepared(decode(image, geometry, max_pixels=most, scaled_jpeg=scaled), source.stages)
        if image.dtype != np.uint8 or image.shape != shape:
            raise InvalidImage(f"pixels are {image.dtype} {image.shape}; the model takes uint8 {shape}")
        return _Prepared(Decoded(np.ascontiguousarray(image), geometry.width, geometry.height), source.stages)

    def _run(
        self, executable: Executable, instance: int, payloads: Sequence[_Prepared], *, alone: bool
    ) -> list[_Inferred]:
        stages = any(each.stages for each in payloads)  # one forward for all of them
        try:
            with self._devices.watched():
                pixels = [each.decoded.pixels for each in payloads]
                outputs = executable.run(instance, pixels, alone=alone, stages=stages)
        except MemoryError as error:
            raise OutOfMemory(f"the outputs of a batch of {len(payloads)} do not fit into memory") from error
        return [
            (each.decoded, output if each.stages else output._replace(stages=()))
            for each, output in zip(payloads, outputs, strict=True)
        ]

    async def infer(
        self, sized: Sized, images: Sequence[Image], deadline: float, *, stages: bool = False
    ) -> list[ImageResult | ServiceError]:
        """Each of `images` through the model, with stage maps if `stages`; one that fails does not harm the others.

        Raises:
            QueueFull: the model's queue has not that many places left; nothing was done.
            DeadlineExceeded: what is queued keeps these images from being answered by `deadline`; nothing was done.
        """
        with self.scheduler.reserve(sized.lane, len(images), deadline):
            if len(images) == 1:
                return [await self._infer_one(sized, images[0], deadline, stages=stages)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._infer_one(sized, image, deadline, stages=stages)) for image in images]
        return [task.result() for task in tasks]

    async def _infer_one(
        self, sized: Sized, image: Image, deadline: float, *, stages: bool
    ) -> ImageResult | ServiceError:
        model, outcome = sized.executable.stored.id, "failed"
        try:
            if isinstance(image, ServiceError):
                outcome = "refused"
                return image
            completed = await self.scheduler.submit(sized.lane, _Source(image, stages), deadline)
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
        timing = Timing(completed.decode_seconds, completed.queue_seconds, completed.run_seconds)
        for stage, seconds in zip(("decode", "queue", "infer"), timing, strict=True):
            self._metrics.stage_seconds.labels(stage, model).observe(seconds)
        decoded, outputs = completed.result
        return ImageResult(decoded.width, decoded.height, outputs, timing, decoded.pixels)
