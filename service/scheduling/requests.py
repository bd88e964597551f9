"""The requests under way: what a shutdown waits for, or gives up."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic

from service.errors import DeadlineExceeded, ShuttingDown


class Requests:
    """Counts requests in and out. Its methods belong to one event loop."""

    def __init__(self) -> None:
        # Mutable state: requests under way and how long each waits for a model that is not loaded; whether new ones are
        # refused, and whether those under way are given up.
        self._under_way: dict[asyncio.Task[object], float | None] = {}
        self.draining = False
        self.aborted = False

    def __repr__(self) -> str:
        return f"<Requests under_way={len(self._under_way)} draining={self.draining}>"

    @property
    def patience_seconds(self) -> float | None:
        """How long this request waits for a model that is not loaded."""
        task = asyncio.current_task()
        return self._under_way.get(task) if task else None

    async def drain(self) -> None:
        """Refuse new requests from now on and wait for those under way."""
        self.draining = True
        while self._under_way:
            await asyncio.wait(self._under_way)

    def abort(self) -> None:
        """Refuse those under way too: whoever waits gets `ShuttingDown` at once."""
        self.draining = self.aborted = True
        for task in self._under_way:
            task.cancel()

    @contextmanager
    def one(self, patience_seconds: float | None = None) -> Iterator[None]:
        """Hold a request open while the context lasts; within one that is, it does nothing.

        Raises:
            ShuttingDown: no new ones are taken, or this one has just been given up.
        """
        task = asyncio.current_task()
        if task is None or task in self._under_way:
            yield
            return
        if self.draining:
            raise ShuttingDown("the service is shutting down and takes no new work; send the request again")
        self._under_way[task] = patience_seconds
        try:
            yield
        except asyncio.CancelledError:
            if not self.aborted:
                raise
            task.uncancel()
            raise ShuttingDown("the service stopped before this request was answered; send it again") from None
        finally:
            del self._under_way[task]


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[float]:
    """The time one request has; yields when it ends, on `monotonic`.

    Raises:
        DeadlineExceeded: it ended.
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
