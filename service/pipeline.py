"""The way of an image through a loaded model: decoded on a thread, queued, run in a batch."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from service.backends.base import Backend
from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.images import Decoded, decode
from service.loader import Executable, Pixels
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.outputs import Outputs
from service.results import Inferred, Timing
from service.scheduler import Lane, Scheduler, Stats
from service.workers import Workers

# An encoded picture, or the error that reading it already gave.
Image = bytes | InvalidImage


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded model and its way into the scheduler."""

    executable: Executable
    lane: Lane[Pixels, Outputs]

    @property
    def id(self) -> str:
        """The model's name."""
        return self.executable.stored.id


class Pipeline:
    """Decode threads, the scheduler and its instances. It lives until it is closed."""

    def __init__(self, options: EngineOptions, backend: Backend, metrics: EngineMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._decoders = Workers("decode", options.cores)
        self._instances = Workers("infer", backend.instances)
        self._scheduler = Scheduler[Pixels, Outputs](
            backend.instances, metrics, max_delay_seconds=options.max_batch_delay_seconds
        )

    async def close(self, *, wait: bool) -> None:
        """Finish what is queued and end the threads; without `wait`, give up both."""
        await self._scheduler.close(wait=wait)
        self._decoders.close(wait=wait)
        self._instances.close(wait=wait)

    def open(self, executable: Executable) -> Resident:
        """Give `executable` its queue."""

        async def run(instance: int, images: Sequence[Pixels]) -> Sequence[Outputs]:
            return await self._instances.run(executable.run, instance, images)

        name = executable.stored.id
        return Resident(executable, self._scheduler.open_lane(name, executable.plan, run, self._options.queue_size))

    async def infer(
        self, resident: Resident, images: Sequence[Image], deadline: float
    ) -> list[Inferred | ServiceError]:
        """Each of `images` through the model; one that fails does not harm the others.

        Raises:
            QueueFull: the model's queue has not that many places left; nothing was done.
        """
        with self._scheduler.places(resident.lane, len(images)):
            if len(images) == 1:
                return [await self._infer_one(resident, images[0], deadline)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._infer_one(resident, image, deadline)) for image in images]
        return [task.result() for task in tasks]

    def stats(self) -> Stats:
        """The scheduler's present state."""
        return self._scheduler.stats()

    def stalled(self, *others: Workers) -> list[str]:
        """A reason for each kind of thread, `others` too, that has been at one job for longer than options allow."""
        return [
            f"a thread for {workers.name} has been at one job for {seconds:.0f} s"
            for workers in (self._decoders, self._instances, *others)
            if (seconds := workers.stalled_seconds()) > self._options.stall_seconds
        ]

    async def _infer_one(self, resident: Resident, image: Image, deadline: float) -> Inferred | ServiceError:
        if isinstance(image, ServiceError):
            self._count(resident, "refused")
            return image
        try:
            inferred = await self._through(resident, image, deadline)
        except asyncio.CancelledError:
            self._count(resident, "cancelled")
            raise
        except (InvalidImage, ImageTooLarge) as error:
            self._count(resident, "refused")
            return error
        except ServiceError as error:
            self._count(resident, "failed")
            return error
        except Exception:
            self._count(resident, "failed")
            raise
        self._count(resident, "answered")
        return inferred

    async def _through(self, resident: Resident, image: bytes, deadline: float) -> Inferred:
        start = perf_counter()
        decoded = await self._decode(resident, image)
        decode_seconds = perf_counter() - start
        completed = await self._scheduler.submit(resident.lane, decoded.pixels, deadline)
        timing = Timing(decode_seconds, completed.queue_seconds, completed.run_seconds)
        for stage, seconds in zip(("decode", "queue", "infer"), timing, strict=True):
            self._metrics.stage_seconds.labels(stage, resident.id).observe(seconds)
        return Inferred(decoded.width, decoded.height, completed.result, timing)

    async def _decode(self, resident: Resident, image: bytes) -> Decoded:
        geometry, options = resident.executable.card.preprocessing.geometry, self._options
        try:
            return await self._decoders.run(
                decode, image, geometry, max_pixels=options.max_image_pixels, scaled_jpeg=options.scaled_jpeg
            )
        except asyncio.CancelledError:
            self._metrics.cancelled("decode")
            raise

    def _count(self, resident: Resident, outcome: str) -> None:
        self._metrics.images.labels(resident.id, outcome).inc()
