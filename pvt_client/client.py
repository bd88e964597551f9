"""The clients: `Client` waits for each response, `AsyncClient` is awaited.

Both carry out the steps of `Exchange.steps`, and have the functions of `pvt_client.calls` as their methods.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import httpx

from pvt_client import calls
from pvt_client.calls import Call, Embedding, Features, FeaturesOptions, Prediction, PredictOptions
from pvt_client.errors import OF_ONE_IMAGE, PvtError
from pvt_client.exchange import NO_RESPONSE, Attempt, Exchange, Outcome, Response
from pvt_client.images import AnyImage

P = ParamSpec("P")
T = TypeVar("T")
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


def _sent_async(make: Callable[P, Call[T]]) -> Callable[Concatenate["AsyncCalls", P], Coroutine[Any, Any, T]]:
    """A method of `AsyncCalls` that sends the call that `make` returns."""

    @wraps(make)
    async def method(self: "AsyncCalls", /, *args: P.args, **kwargs: P.kwargs) -> T:
        image = args[0] if args else kwargs.get("image", b"")
        return await self.send(await self.prepare(lambda: make(*args, **kwargs), image))

    return method


@dataclass(eq=False, repr=False)
class Client(Exchange):
    """A client of the service at `url`. It keeps connections open, and threads may share it.

    `timeout`: seconds for each call, all its attempts together; the service is sent what is left of it. None: no limit.
    Every method raises PvtError, see `pvt_client.errors`.
    """

    transport: httpx.BaseTransport | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        settings = self.http_settings(httpx.HTTPTransport)
        self._http = httpx.Client(**settings | ({"transport": self.transport} if self.transport else {}))

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
        steps = self.steps(call)
        step = next(steps)
        while isinstance(step, Attempt):
            if step.wait:
                self.clock.sleep(step.wait)
            step = steps.send(self._attempt(step))
        return step.value

    def _attempt(self, attempt: Attempt) -> Outcome:
        try:
            with closing(self._http.send(self._http.build_request(**attempt.request), stream=True)) as response:
                body = bytearray()
                for chunk in response.iter_bytes():  # httpx limits each, not all together
                    body += chunk
                    if attempt.deadline is not None and self.clock.monotonic() > attempt.deadline:
                        raise TimeoutError
                return Response(response.status_code, response.headers, bytes(body))
        except NO_RESPONSE as error:
            return self.failure(error)


class AsyncCalls(ABC):
    """The methods of `AsyncClient`, over a `send` that a subclass defines."""

    @abstractmethod
    async def send(self, call: Call[T]) -> T:
        """The result of `call`."""

    async def prepare(self, make: Callable[[], Call[T]], image: object) -> Call[T]:
        """The call that `make` returns; any image but bytes is read or compressed by it, which is done on a thread."""
        return make() if isinstance(image, bytes) else await asyncio.to_thread(make)

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
        return self.many(lambda image: calls.predict(image, **options), images, concurrency)

    def features_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> AsyncGenerator[tuple[AnyImage, Features | PvtError]]:
        """See `Client.features_many`."""
        return self.many(lambda image: calls.features(image, **options), images, concurrency)

    def embedding_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> AsyncGenerator[tuple[AnyImage, Embedding | PvtError]]:
        """See `Client.embedding_many`."""
        return self.many(lambda image: calls.embedding(image, **options), images, concurrency)

    async def many(
        self, make: Callable[[AnyImage], Call[T]], images: Iterable[AnyImage], concurrency: int
    ) -> AsyncGenerator[tuple[AnyImage, T | PvtError]]:
        """Each of `images` with the result of the call that `make` returns for it; see `predict_many`."""
        ahead, slots = _ahead(concurrency), asyncio.Semaphore(concurrency)
        tasks: set[asyncio.Task[T | PvtError]] = set()

        async def result(image: AnyImage) -> T | PvtError:
            async with slots:
                try:
                    return await self.send(await self.prepare(lambda: make(image), image))
                except OF_ONE_IMAGE as error:
                    return error

        def begin(image: AnyImage) -> asyncio.Task[T | PvtError]:
            tasks.add(task := asyncio.create_task(result(image)))
            return task

        try:
            for image, task in _begun(begin, images, ahead):
                found = await task
                tasks.remove(task)
                yield image, found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(eq=False, repr=False)
class AsyncClient(Exchange, AsyncCalls):
    """As `Client`, for asyncio; files are read on a thread."""

    transport: httpx.AsyncBaseTransport | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        settings = self.http_settings(httpx.AsyncHTTPTransport)
        self._http = httpx.AsyncClient(**settings | ({"transport": self.transport} if self.transport else {}))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """See `Client.send`."""
        steps = self.steps(call)
        step = next(steps)
        while isinstance(step, Attempt):
            if step.wait:
                await self.clock.sleep_async(step.wait)
            step = steps.send(await self._attempt(step))
        return step.value

    async def _attempt(self, attempt: Attempt) -> Outcome:
        try:
            async with asyncio.timeout(attempt.seconds):  # httpx limits each read, not all together
                response = await self._http.send(self._http.build_request(**attempt.request))
        except NO_RESPONSE as error:
            return self.failure(error)
        return Response(response.status_code, response.headers, response.content)


def _ahead(concurrency: int) -> int:
    """How many calls may be begun and not yet yielded; raises ValueError if `concurrency` is less than 1."""
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it is the number of calls that run at a time, 1 or more")
    return _AHEAD * concurrency


def _begun(begin: Callable[[AnyImage], F], images: Iterable[AnyImage], ahead: int) -> Generator[tuple[AnyImage, F]]:
    """Each of `images` in order with what `begin` returned for it, called ahead of time for the next ones."""
    begun: deque[tuple[AnyImage, F]] = deque()
    for image in images:
        begun.append((image, begin(image)))
        if len(begun) >= ahead:
            yield begun.popleft()
    yield from begun
