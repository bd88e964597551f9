"""The one door from asynchronous code to blocking code: named threads, a fixed number of them."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from time import monotonic
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job:
    call: Callable[[], Any]
    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop

    def run(self) -> None:
        """Call, and end the future on its own loop, unless its caller has gone meanwhile."""
        try:
            result = self.call()
        except BaseException as error:  # noqa: BLE001  whatever it is belongs to the caller
            self._end(self.future.set_exception, error)
        else:
            self._end(self.future.set_result, result)

    def _end(self, set_outcome: Callable[[Any], None], outcome: object) -> None:
        self.loop.call_soon_threadsafe(lambda: None if self.future.done() else set_outcome(outcome))


class Workers:
    """A pool of `threads` threads for one kind of work, which can say whether one of them is stuck.

    Half the cost of `ThreadPoolExecutor` with `wrap_future` per job, which an image pays twice (docs/architecture.md).
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"pvt-{name}-{i}") for i in range(threads)]
        # Mutable state: when each busy thread began its job, on the monotonic clock.
        self._since: dict[int, float] = {}
        for thread in self._threads:
            thread.daemon = True  # a thread that is stuck in native code must not keep the process alive
            thread.start()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` on one of the threads. A caller that is cancelled while the job waits takes it along."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put(_Job(partial(function, *args, **kwargs), future, loop))
        return await future

    def stalled_seconds(self) -> float:
        """How long the job that has run longest has been running; 0 when all threads are idle."""
        return monotonic() - min(self._since.copy().values(), default=monotonic())

    def close(self) -> None:
        """End the threads once what was asked of them is done."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        me = threading.get_ident()
        while (job := self._jobs.get()) is not None:
            if job.future.cancelled():
                continue
            self._since[me] = monotonic()
            job.run()
            del self._since[me]
            del job  # or its result would live until the next one comes
