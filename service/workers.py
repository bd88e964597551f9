"""The one door from asynchronous code to blocking code: named threads, a fixed number of them."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def detached(function: Callable[[], T]) -> T:
    """Call `function` on a new daemon thread, which does not keep the process from ending.

    For calls that take minutes and may be lost. When the caller is cancelled, the call goes on.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  the caller raises it
            future.set_exception(error)

    threading.Thread(target=call, name="pvt-detached", daemon=True).start()
    return await asyncio.shield(asyncio.wrap_future(future))


class Workers:
    """A pool of `threads` threads for one kind of work, which can say whether one of them is stuck."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"pvt-{name}")
        # Mutable state: when each busy thread began its job, on the monotonic clock.
        self._since: dict[int, float] = {}

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` on one of the threads. When the caller is cancelled, a call that still waits is dropped."""

        def timed() -> T:
            thread = threading.get_ident()
            self._since[thread] = monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                del self._since[thread]

        return await asyncio.get_running_loop().run_in_executor(self._pool, timed)

    def stalled_seconds(self) -> float:
        """How long the job that has run longest has been running; 0 when all threads are idle."""
        now = monotonic()
        return now - min(self._since.copy().values(), default=now)

    def close(self, *, wait: bool = True) -> None:
        """Drop the jobs that wait, and end the threads; without `wait`, return before they have ended."""
        self._pool.shutdown(wait=wait, cancel_futures=True)
