"""The clients: `Client` waits for each response, `AsyncClient` is awaited.

Both carry out the steps of `Exchange.steps`, and have the functions of `pvt_client.calls` as their methods.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import closing
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import httpx

from pvt_client import calls
from pvt_client.calls import Call, FeaturesOptions, PredictOptions
from pvt_client.concurrency import in_tasks, in_threads
from pvt_client.errors import OF_ONE_IMAGE, PvtError
from pvt_client.exchange import Attempt, Clock, Exchange, Outcome, Retries, http_settings
from pvt_client.images import AnyImage
from pvt_client.results import Embedding, Features, Prediction, Response

P = ParamSpec("P")
T = TypeVar("T")


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
        return await self.send(await _made(lambda: make(*args, **kwargs), image))

    return method


async def _made(make: Callable[[], Call[T]], image: object) -> Call[T]:
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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._exchange = Exchange(retries or Retries(), clock or Clock(), timeout)
        self._sleep = sleep
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
        return self.many(lambda image: calls.predict(image, **options), images, concurrency=concurrency)

    def features_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> Generator[tuple[AnyImage, Features | PvtError]]:
        """Each of `images` with its features; see `predict_many`."""
        return self.many(lambda image: calls.features(image, **options), images, concurrency=concurrency)

    def embedding_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> Generator[tuple[AnyImage, Embedding | PvtError]]:
        """Each of `images` with its embedding and its size; see `predict_many`."""
        return self.many(lambda image: calls.embedding(image, **options), images, concurrency=concurrency)

    def many(
        self, make: Callable[[AnyImage], Call[T]], images: Iterable[AnyImage], *, concurrency: int = 8
    ) -> Generator[tuple[AnyImage, T | PvtError]]:
        """Each of `images` with the result of the call that `make` returns for it; see `predict_many`."""

        def result(image: AnyImage) -> T | PvtError:
            try:
                return self.send(make(image))
            except OF_ONE_IMAGE as error:
                return error

        return in_threads(result, images, concurrency)

    def send(self, call: Call[T]) -> T:
        """The result of `call`, after as many attempts as it takes."""
        steps = self._exchange.steps(call)
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = self._attempt(step) if isinstance(step, Attempt) else self._sleep(step)

    def _attempt(self, attempt: Attempt) -> Outcome:
        try:
            with closing(self._http.send(attempt.request(self._http), stream=True)) as response:
                body = bytearray()
                for chunk in response.iter_bytes():  # httpx limits each, not all together
                    body += chunk
                    if self._exchange.is_late(attempt):
                        return self._exchange.timed_out()
                return Response(response.status_code, {**response.headers}, bytes(body))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return self._exchange.translated(error)


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
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._exchange = Exchange(retries or Retries(), clock or Clock(), timeout)
        self._sleep = sleep
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
        return self.many(lambda image: calls.predict(image, **options), images, concurrency=concurrency)

    def features_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> AsyncGenerator[tuple[AnyImage, Features | PvtError]]:
        """See `Client.features_many`."""
        return self.many(lambda image: calls.features(image, **options), images, concurrency=concurrency)

    def embedding_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> AsyncGenerator[tuple[AnyImage, Embedding | PvtError]]:
        """See `Client.embedding_many`."""
        return self.many(lambda image: calls.embedding(image, **options), images, concurrency=concurrency)

    def many(
        self, make: Callable[[AnyImage], Call[T]], images: Iterable[AnyImage], *, concurrency: int = 8
    ) -> AsyncGenerator[tuple[AnyImage, T | PvtError]]:
        """See `Client.many`."""

        async def result(image: AnyImage) -> T | PvtError:
            try:
                return await self.send(await _made(lambda: make(image), image))
            except OF_ONE_IMAGE as error:
                return error

        return in_tasks(result, images, concurrency)

    async def send(self, call: Call[T]) -> T:
        """See `Client.send`."""
        steps = self._exchange.steps(call)
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = await (self._attempt(step) if isinstance(step, Attempt) else self._sleep(step))

    async def _attempt(self, attempt: Attempt) -> Outcome:
        try:
            async with asyncio.timeout(attempt.seconds):  # httpx limits each read, not all together
                response = await self._http.send(attempt.request(self._http))
        except TimeoutError:
            return self._exchange.timed_out()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return self._exchange.translated(error)
        return Response(response.status_code, {**response.headers}, response.content)
