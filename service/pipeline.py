"""The way of an image through a loaded model: decoded on a thread, queued, run in a batch."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from service.activity import Activity, Stats
from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.images import Decoded, decode
from service.lanes import Lane
from service.loader import Executable
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.outputs import Outputs
from service.results import Inferred, Timing
from service.scheduler import Scheduler
from service.workers import Workers

# An encoded picture, or the error that reading it already gave.
Image = bytes | InvalidImage


class _Seen(NamedTuple):
    """What one picture gave, and its own size in pixels."""

    width: int
    height: int
    outputs: Outputs


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded model and its way into the scheduler."""

    executable: Executable
    lane: Lane[bytes, Decoded, _Seen]

    @property
    def id(self) -> str:
        """The model's name."""
        return self.executable.stored.id


class Pipeline:
    """The scheduler, and what its threads do for each model. It lives until it is closed."""

    def __init__(self, options: EngineOptions, metrics: EngineMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._scheduler = Scheduler[bytes, Decoded, _Seen](
            options.instances,
            metrics,
            decoders=options.cores,
            max_delay_seconds=options.max_batch_delay_seconds,
        )

    async def close(self, *, wait: bool) -> None:
        """Finish what is queued and end the threads; without `wait`, give up both."""
        await self._scheduler.close(wait=wait)

    def open(self, executable: Executable) -> Resident:
        """Give `executable` its lane."""
        geometry, options = executable.card.preprocessing.geometry, self._options

        def prepare(image: bytes) -> Decoded:
            return decode(image, geometry, max_pixels=options.max_image_pixels, scaled_jpeg=options.scaled_jpeg)

        def run(instance: int, payloads: Sequence[Decoded], *, alone: bool) -> Sequence[_Seen]:
            outputs = executable.run(instance, [each.pixels for each in payloads], alone=alone)
            return [_Seen(each.width, each.height, out) for each, out in zip(payloads, outputs, strict=True)]

        name, capacity = executable.stored.id, options.queue_size
        return Resident(executable, self._scheduler.open_lane(name, executable.plan, prepare, run, capacity))

    async def infer(
        self, resident: Resident, images: Sequence[Image], deadline: float
    ) -> list[Inferred | ServiceError]:
        """Each of `images` through the model; one that fails does not harm the others.

        Raises:
            QueueFull: the model's queue has not that many places left; nothing was done.
            DeadlineExceeded: what is queued keeps these images from being answered by `deadline`; nothing was done.
        """
        with self._scheduler.places(resident.lane, len(images), deadline):
            if len(images) == 1:
                return [await self._infer_one(resident, images[0], deadline)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._infer_one(resident, image, deadline)) for image in images]
        return [task.result() for task in tasks]

    def stats(self) -> Stats:
        """The scheduler's present state, in numbers."""
        return self._scheduler.stats()

    def activity(self) -> Activity:
        """The scheduler's present state, in full."""
        return self._scheduler.activity()

    def stalled(self, *others: Workers) -> list[str]:
        """A reason for each kind of thread, `others` too, that has been at one job for longer than options allow."""
        busy = self._scheduler.stalled_seconds() | {workers.name: workers.stalled_seconds() for workers in others}
        return [
            f"a thread for {name} has been at one job for {seconds:.0f} s"
            for name, seconds in busy.items()
            if seconds > self._options.stall_seconds
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
        completed = await self._scheduler.submit(resident.lane, image, deadline)
        timing = Timing(completed.decode_seconds, completed.queue_seconds, completed.run_seconds)
        for stage, seconds in zip(("decode", "queue", "infer"), timing, strict=True):
            self._metrics.stage_seconds.labels(stage, resident.id).observe(seconds)
        return Inferred(*completed.result, timing)

    def _count(self, resident: Resident, outcome: str) -> None:
        self._metrics.images.labels(resident.id, outcome).inc()
