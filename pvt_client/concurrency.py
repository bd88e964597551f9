"""Many calls, a bounded number at a time, with their results in order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

I = TypeVar("I")  # noqa: E741  an item
R = TypeVar("R")
F = TypeVar("F")  # the future of a result

# How many calls may be begun and not yet yielded, for each one that may run: while the first of them is slow the others
# go on. Only results wait here; images are in memory only while their call runs.
_AHEAD = 4


def in_threads(work: Callable[[I], R], items: Iterable[I], concurrency: int) -> Generator[tuple[I, R]]:
    """Each of `items` with the result of `work`, `concurrency` at a time.

    Raises:
        ValueError: `concurrency` is less than 1.
    """
    _check(concurrency)
    pool = ThreadPoolExecutor(concurrency, "pvt-client")
    try:
        for item, future in _begun(lambda item: pool.submit(work, item), items, concurrency):
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


async def in_tasks(
    work: Callable[[I], Awaitable[R]], items: Iterable[I], concurrency: int
) -> AsyncGenerator[tuple[I, R]]:
    """As `in_threads`, on the event loop."""
    _check(concurrency)
    slots = asyncio.Semaphore(concurrency)
    tasks: set[asyncio.Task[R]] = set()

    async def bounded(item: I) -> R:
        async with slots:
            return await work(item)

    def begin(item: I) -> asyncio.Task[R]:
        tasks.add(task := asyncio.create_task(bounded(item)))
        return task

    try:
        for item, task in _begun(begin, items, concurrency):
            result = await task
            tasks.remove(task)
            yield item, result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _begun(begin: Callable[[I], F], items: Iterable[I], concurrency: int) -> Generator[tuple[I, F]]:
    """Each of `items` in order with what `begin` returned for it, called ahead of time for the next ones."""
    begun: deque[tuple[I, F]] = deque()
    for item in items:
        begun.append((item, begin(item)))
        if len(begun) >= _AHEAD * concurrency:
            yield begun.popleft()
    yield from begun


def _check(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it is the number of calls that run at a time, 1 or more")
