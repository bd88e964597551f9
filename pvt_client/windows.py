"""Many calls, a bounded number at a time, their outcomes in order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

I = TypeVar("I")  # noqa: E741  an item
R = TypeVar("R")

# How many may have been begun and not been given out, for each one that may run: while the first of them is slow the
# others go on. What waits here is outcomes; pictures are in memory only while their call runs.
_AHEAD = 4


def in_threads(work: Callable[[I], R], items: Iterable[I], concurrency: int) -> Generator[tuple[I, R]]:
    """Each of `items` with what `work` makes of it, `concurrency` at a time.

    Raises:
        ValueError: `concurrency` is less than 1.
    """
    _check(concurrency)
    pool = ThreadPoolExecutor(concurrency, "pvt-client")
    begun: deque[tuple[I, Future[R]]] = deque()
    try:
        for item in items:
            begun.append((item, pool.submit(work, item)))
            if len(begun) >= _AHEAD * concurrency:
                yield _next(begun)
        while begun:
            yield _next(begun)
    finally:
        pool.shutdown(cancel_futures=True)


def _next(begun: deque[tuple[I, Future[R]]]) -> tuple[I, R]:
    item, future = begun.popleft()
    return item, future.result()


async def in_tasks(
    work: Callable[[I], Awaitable[R]], items: Iterable[I], concurrency: int
) -> AsyncGenerator[tuple[I, R]]:
    """The same on the event loop."""
    _check(concurrency)
    slots = asyncio.Semaphore(concurrency)
    begun: deque[tuple[I, asyncio.Task[R]]] = deque()

    async def run(item: I) -> R:
        async with slots:
            return await work(item)

    try:
        for item in items:
            begun.append((item, asyncio.create_task(run(item))))
            if len(begun) >= _AHEAD * concurrency:
                first, task = begun[0]
                yield first, await task
                begun.popleft()
        while begun:
            first, task = begun[0]
            yield first, await task
            begun.popleft()
    finally:
        for _, task in begun:
            task.cancel()
        await asyncio.gather(*(task for _, task in begun), return_exceptions=True)


def _check(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it counts the calls that run at the same time, 1 or more")
