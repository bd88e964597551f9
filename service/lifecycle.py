"""The requests under way: what a shutdown waits for, or ends; and the time that each has."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic

from service.errors import DeadlineExceeded, ShuttingDown


class Requests:
    """Counts requests in and out. Its methods belong to one event loop."""

    def __init__(self) -> None:
        # Mutable state: the tasks of the requests under way; whether new ones are refused, and whether those under way
        # are ended too.
        self._under_way: set[asyncio.Task[object]] = set()
        self.draining = False
        self.aborted = False

    async def drain(self) -> None:
        """Refuse new requests from now on and wait for those under way."""
        self.draining = True
        while self._under_way:
            await asyncio.wait(self._under_way)

    def abort(self) -> None:
        """End those under way too: each raises `ShuttingDown` at once."""
        self.draining = self.aborted = True
        for task in self._under_way:
            task.cancel()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count this task as a request while the context lasts; nested contexts count once.

        Enter it before reading a request's body, so that a shutdown does not cut off an upload.

        Raises:
            ShuttingDown: no new requests are accepted, or this one has just been ended.
        """
        task = asyncio.current_task()
        if task is None or task in self._under_way:
            yield
            return
        if self.draining:
            raise ShuttingDown("the service is shutting down and takes no new work; send the request again")
        self._under_way.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.aborted:
                raise
            task.uncancel()
            raise ShuttingDown("the service stopped before this request was answered; send it again") from None
        finally:
            self._under_way.discard(task)


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[float]:
    """Limit the time of one request; yields its deadline, on `monotonic`.

    Raises:
        DeadlineExceeded: the time is over.
    """
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield monotonic() + seconds
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise DeadlineExceeded(
            f"no answer within {seconds * 1000:.0f} ms; allow more with timeout_ms or PVT_TIMEOUT_MS"
        ) from error
