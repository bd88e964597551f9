"""Work that several callers wait for, done once, and its end.

An error keeps the frames it went through, with all that these refer to: of a caller, its images. So each caller gets a
copy of the error, and only copies are kept.
"""

import asyncio
from collections.abc import Hashable, Iterable
from copy import copy
from typing import Any, TypeVar

from service.errors import ServiceError

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def fresh(error: E) -> E:
    """A copy of a ServiceError, without the frames it went through; any other error as it is."""
    return copy(error) if isinstance(error, ServiceError) else error


async def shared(task: asyncio.Task[T], max_wait_seconds: float | None = None) -> T:
    """The result of `task`. A caller that is cancelled, or waits no longer, leaves it running for the others.

    Raises:
        TimeoutError: it has not ended within `max_wait_seconds`.
        Exception: the task's own error, which is a copy if it is a ServiceError.
    """
    done, _ = await asyncio.wait([task], timeout=max_wait_seconds)
    if not done:
        raise TimeoutError
    try:
        return task.result()
    except ServiceError as error:
        raise fresh(error) from None


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel all of `tasks`, and return when they have ended."""
    cancelled = [*tasks]
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)


class RecentErrors:
    """Remembers for each key the error of its last attempt, for `seconds` on the event loop's clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # Mutable state: when each key failed, and with what.
        self._errors: dict[Hashable, tuple[float, ServiceError]] = {}

    def note(self, key: Hashable, task: asyncio.Task[T]) -> None:
        """The last attempt for `key` is `task`, which has ended."""
        self._errors.pop(key, None)
        if not task.cancelled() and isinstance(error := task.exception(), ServiceError):
            self._errors[key] = asyncio.get_running_loop().time(), fresh(error)

    def get(self, key: Hashable) -> ServiceError | None:
        """A copy of the error of `key`, if it is recent."""
        at, error = self._errors.get(key, (0.0, None))
        return fresh(error) if error and asyncio.get_running_loop().time() - at < self._seconds else None
