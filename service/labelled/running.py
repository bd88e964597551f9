"""Many images through an engine, at the speed of full batches."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import TypeVar

from service.engine import Engine
from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.results import Image, ImageResult

T = TypeVar("T")
_TIMEOUT_SECONDS = 3600.0  # nobody else is waiting; the first image waits until its model is loaded


async def infer_many(
    engine: Engine, model: str, items: Iterable[T], read: Callable[[T], Image]
) -> AsyncIterator[tuple[T, ImageResult | ServiceError]]:
    """Each of `items`, in order, with the outputs of `model` for the image that `read` returns on a thread.

    Raises what `Engine.infer` raises of models.
    """
    running: deque[tuple[T, asyncio.Task[ImageResult | ServiceError]]] = deque()

    async def infer(item: T) -> ImageResult | ServiceError:
        image = await asyncio.to_thread(read, item)
        answered = await engine.infer([image], model=model, timeout_seconds=_TIMEOUT_SECONDS)
        return answered.results[0]

    try:
        for item in items:
            running.append((item, asyncio.create_task(infer(item))))
            if len(running) == engine.options.images_at_a_time:
                first, task = running[0]
                yield first, await task
                running.popleft()
        while running:
            first, task = running[0]
            yield first, await task
            running.popleft()
    finally:
        for _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)


def read_image(path: Path, max_bytes: int) -> bytes | ServiceError:
    """The bytes of a file, or why it can't be read; one of more than `max_bytes` is not."""
    try:
        if (size := path.stat().st_size) > max_bytes:
            megabytes = f"{size / 1e6:.0f} MB are more than the {max_bytes / 1e6:g} MB that PVT_MAX_BODY_MB allows"
            return ImageTooLarge(megabytes)
        return path.read_bytes()
    except OSError as error:
        return InvalidImage(error.strerror or str(error))
