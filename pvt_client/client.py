"""The clients: `Client` waits for each response, `AsyncClient` is awaited.

Both carry out the steps of `Exchange.steps`, and have the functions of `pvt_client.calls` as their methods.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import httpx

from pvt_client import calls
from pvt_client.calls import Call, Embedding, Features, FeaturesOptions, Prediction, PredictOptions
from pvt_client.errors import OF_ONE_IMAGE, PvtError
from pvt_client.exchange import NO_RESPONSE, Attempt, Clock, Exchange, Outcome, Response, Retries, http_settings
from pvt_client.images import AnyImage

P = ParamSpec("P")
T = TypeVar("T")
I = TypeVar("I")  # noqa: E741  an item
F = TypeVar("F")  # the future of a result

# How many calls may be begun and not yet yielded, for each one that may run: while the first of them is slow the others
# go on. Only results wait here; images are in memory only while their call runs.
_AHEAD = 4


def _sent(make: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]:
    """A method of `Client` that sends the call that `make` returns."""

    @wraps(make)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(make(*args, **kwargs))

    return method


def _sent_async(make: Callable[P, Call[T]]) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """A method of `AsyncClient` that sends the call that `make` returns."""

    @wraps(make)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        image = args[0] if args else kwargs.get("image", b"")
        return await self.send(await _call(lambda: make(*args, **kwargs), image))

    return method


async def _call(make: Callable[[], Call[T]], image: object) -> Call[T]:
    """The call; any image but bytes is a file to read or pixels to compress, which is done on a thread."""
    return make() if isinstance(image, bytes) else await asyncio.to_thread(make)


class Client:
    """A client of the service at `url`. It keeps connections open, and threads may share it.

    `timeout`: seconds for each call, all its attempts together; the service is sent what is left of it. None: no limit.
    Every method raises PvtError, see `pvt_client.errors`.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float | None = 60.0,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._exchange = Exchange(retries or Retries(), clock or Clock(), timeout)
        self._http = httpx.Client(**http_settings(url, api_key), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    predict = _sent(calls.predict)
    features = _sent(calls.features)
    embedding = _sent(calls.embedding)
    explain = _sent(calls.explain)
    explain_map = _sent(calls.explain_map)
    models = _sent(calls.models)
    model = _sent(calls.model)
    health = _sent(calls.health)

    def predict_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[PredictOptions]
    ) -> Generator[tuple[AnyImage, Prediction | PvtError]]:
        """Each of `images` with its best classes, in order, `concurrency` requests at a time.

        The error of a bad image takes its place; an error that the other images would meet too is raised. Only images
        whose request is under way are in memory, so `images` may be endless.
        """
        return self._many(lambda image: calls.predict(image, **options), images, concurrency)

    def features_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> Generator[tuple[AnyImage, Features | PvtError]]:
        """Each of `images` with its features; see `predict_many`."""
        return self._many(lambda image: calls.features(image, **options), images, concurrency)

    def embedding_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> Generator[tuple[AnyImage, Embedding | PvtError]]:
        """Each of `images` with its embedding and its size; see `predict_many`."""
        return self._many(lambda image: calls.embedding(image, **options), images, concurrency)

    def _many(
        self, make: Callable[[AnyImage], Call[T]], images: Iterable[AnyImage], concurrency: int
    ) -> Generator[tuple[AnyImage, T | PvtError]]:
        def result(image: AnyImage) -> T | PvtError:
            try:
                return self.send(make(image))
            except OF_ONE_IMAGE as error:
                return error

        ahead = _ahead(concurrency)
        pool = ThreadPoolExecutor(concurrency, "pvt-client")
        try:
            for image, future in _begun(lambda image: pool.submit(result, image), images, ahead):
                yield image, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def send(self, call: Call[T]) -> T:
        """The result of `call`, after as many attempts as it takes."""
        steps = self._exchange.steps(call)
        step = next(steps)
        while isinstance(step, Attempt):
            if step.wait:
                self._exchange.clock.sleep(step.wait)
            step = steps.send(self._attempt(step))
        return step.value

    def _attempt(self, attempt: Attempt) -> Outcome:
        try:
            with closing(self._http.send(self._http.build_request(**attempt.request), stream=True)) as response:
                body = bytearray()
                for chunk in response.iter_bytes():  # httpx limits each, not all together
                    body += chunk
                    if attempt.deadline is not None and self._exchange.clock.monotonic() > attempt.deadline:
                        raise TimeoutError
                return Response(response.status_code, response.headers, bytes(body))
        except NO_RESPONSE as error:
            return self._exchange.failure(error)


class AsyncClient:
    """As `Client`, for asyncio; files are read on a thread."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float | None = 60.0,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._exchange = Exchange(retries or Retries(), clock or Clock(), timeout)
        self._http = httpx.AsyncClient(**http_settings(url, api_key), transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    predict = _sent_async(calls.predict)
    features = _sent_async(calls.features)
    embedding = _sent_async(calls.embedding)
    explain = _sent_async(calls.explain)
    explain_map = _sent_async(calls.explain_map)
    models = _sent_async(calls.models)
    model = _sent_async(calls.model)
    health = _sent_async(calls.health)

    def predict_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[PredictOptions]
    ) -> AsyncGenerator[tuple[AnyImage, Prediction | PvtError]]:
        """See `Client.predict_many`."""
        return self._many(lambda image: calls.predict(image, **options), images, concurrency)

    def features_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> AsyncGenerator[tuple[AnyImage, Features | PvtError]]:
        """See `Client.features_many`."""
        return self._many(lambda image: calls.features(image, **options), images, concurrency)

    def embedding_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> AsyncGenerator[tuple[AnyImage, Embedding | PvtError]]:
        """See `Client.embedding_many`."""
        return self._many(lambda image: calls.embedding(image, **options), images, concurrency)

    def _many(
        self, make: Callable[[AnyImage], Call[T]], images: Iterable[AnyImage], concurrency: int
    ) -> AsyncGenerator[tuple[AnyImage, T | PvtError]]:
        async def result(image: AnyImage) -> T | PvtError:
            try:
                return await self.send(await _call(lambda: make(image), image))
            except OF_ONE_IMAGE as error:
                return error

        return in_tasks(result, images, concurrency)

    async def send(self, call: Call[T]) -> T:
        """See `Client.send`."""
        steps = self._exchange.steps(call)
        step = next(steps)
        while isinstance(step, Attempt):
            if step.wait:
                await self._exchange.clock.sleep_async(step.wait)
            step = steps.send(await self._attempt(step))
        return step.value

    async def _attempt(self, attempt: Attempt) -> Outcome:
        try:
            async with asyncio.timeout(attempt.seconds):  # httpx limits each read, not all together
                response = await self._http.send(self._http.build_request(**attempt.request))
        except NO_RESPONSE as error:
            return self._exchange.failure(error)
        return Response(response.status_code, response.headers, response.content)


async def in_tasks(
    work: Callable[[I], Awaitable[T]], items: Iterable[I], concurrency: int
) -> AsyncGenerator[tuple[I, T]]:
    """Each of `items` in order with the result of `work`, `concurrency` at a time.

    Raises:
        ValueError: `concurrency` is less than 1.
    """
    ahead, slots = _ahead(concurrency), asyncio.Semaphore(concurrency)
    tasks: set[asyncio.Task[T]] = set()

    async def bounded(item: I) -> T:
        async with slots:
            return await work(item)

    def begin(item: I) -> asyncio.Task[T]:
        tasks.add(task := asyncio.create_task(bounded(item)))
        return task

    try:
        for item, task in _begun(begin, items, ahead):
            result = await task
            tasks.remove(task)
            yield item, result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _ahead(concurrency: int) -> int:
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it is the number of calls that run at a time, 1 or more")
    return _AHEAD * concurrency


def _begun(begin: Callable[[I], F], items: Iterable[I], ahead: int) -> Generator[tuple[I, F]]:
    """Each of `items` in order with what `begin` returned for it, called ahead of time for the next ones."""
    begun: deque[tuple[I, F]] = deque()
    for item in items:
        begun.append((item, begin(item)))
        if len(begun) >= ahead:
            yield begun.popleft()
    yield from begun
