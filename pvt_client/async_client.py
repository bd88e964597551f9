"""`AsyncClient`, as `Client` for asyncio, and its methods for whatever else can send calls."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, cast, overload

import httpx
import numpy as np
from numpy.typing import NDArray

from pvt_client import calls
from pvt_client.batching import (
    Errors,
    Make,
    ManyOptions,
    Place,
    Progress,
    RequestSize,
    Waiting,
    chosen,
    group,
    rows,
    stacked,
)  # fmt: skip
from pvt_client.calls import Call, EmbedOptions, FeaturesOptions, PredictOptions
from pvt_client.errors import PvtError
from pvt_client.exchange import NO_RESPONSE, Attempt, Exchange, Outcome, Response, Result
from pvt_client.images import AnyImage, Image, Images, batch, check_iterable
from pvt_client.results import Embedding, Features, Prediction

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


def _sent_async(make: Callable[P, Call[T]]) -> Callable[Concatenate["AsyncCalls", P], Coroutine[Any, Any, T]]:
    """A method of `AsyncCalls` that sends the call that `make` returns."""

    @wraps(make)
    async def method(self: "AsyncCalls", /, *args: P.args, **kwargs: P.kwargs) -> T:
        image = args[0] if args else kwargs.get("image", b"")
        return await self.send(await self.prepare(lambda: make(*args, **kwargs), [image]))

    return method


class AsyncCalls(ABC):
    """The methods of `AsyncClient`, over a `send` that a subclass defines."""

    _size = RequestSize(most=1)

    @abstractmethod
    async def send(self, call: Call[T]) -> T:
        """The result of `call`."""

    async def prepare(self, make: Callable[[], R], images: Sequence[object]) -> R:
        """What `make` returns; any of `images` but bytes is read or compressed by it, which is done on a thread."""
        return make() if all(isinstance(each, bytes) for each in images) else await asyncio.to_thread(make)

    embedding = _sent_async(calls.embedding)
    explain = _sent_async(calls.explain)
    explain_map = _sent_async(calls.explain_map)
    models = _sent_async(calls.models)
    model = _sent_async(calls.model)
    health = _sent_async(calls.health)

    @overload
    async def predict(
        self, image: Images[AnyImage], *, errors: Errors = "return", **options: Unpack[PredictOptions]
    ) -> list[Prediction | PvtError]: ...

    @overload
    async def predict(
        self, image: Image, *, errors: Errors = "return", **options: Unpack[PredictOptions]
    ) -> Prediction: ...

    async def predict(
        self, image: Image | Images[AnyImage], *, errors: Errors = "return", **options: Unpack[PredictOptions]
    ) -> Prediction | list[Prediction | PvtError]:
        """See `Client.predict`."""
        if (images := batch(image)) is None:
            one = cast("Image", image)
            return await self.send(await self.prepare(lambda: calls.predict(one, **options), [one]))
        results = await self._results(images, partial(calls.predictions, **options), several=False)
        return [chosen(errors, *each) for each in zip(results, images, range(len(images)), strict=True)]

    async def features(self, image: Image | Images[AnyImage], **options: Unpack[FeaturesOptions]) -> Features:
        """See `Client.features`."""
        if (images := batch(image)) is None:
            one = cast("Image", image)
            return await self.send(await self.prepare(lambda: calls.features(one, **options), [one]))
        return stacked(await self._results(images, partial(calls.features_of, **options), several=False), images)

    def predict_many(
        self,
        images: Iterable[AnyImage] | AsyncIterable[AnyImage],
        *,
        concurrency: int = 8,
        errors: Errors = "return",
        progress: Progress = None,
        **options: Unpack[PredictOptions],
    ) -> AsyncGenerator[tuple[AnyImage, Prediction | PvtError]]:
        """See `Client.predict_many`; `images` may be asynchronous."""
        make = partial(calls.predictions, **options)
        return self.many(make, images, concurrency, errors=errors, progress=progress)

    def features_many(
        self,
        images: Iterable[AnyImage] | AsyncIterable[AnyImage],
        *,
        concurrency: int = 8,
        errors: Errors = "return",
        progress: Progress = None,
        **options: Unpack[FeaturesOptions],
    ) -> AsyncGenerator[tuple[AnyImage, Features | PvtError]]:
        """See `Client.features_many`."""
        make = partial(calls.features_of, **options)
        return self.many(make, images, concurrency, errors=errors, progress=progress)

    def embedding_many(
        self,
        images: Iterable[AnyImage] | AsyncIterable[AnyImage],
        *,
        concurrency: int = 8,
        errors: Errors = "return",
        progress: Progress = None,
        **options: Unpack[FeaturesOptions],
    ) -> AsyncGenerator[tuple[AnyImage, Embedding | PvtError]]:
        """See `Client.embedding_many`."""
        make = partial(calls.embeddings, **options)
        return self.many(make, images, concurrency, errors=errors, progress=progress)

    async def embed(
        self,
        images: Iterable[AnyImage] | AsyncIterable[AnyImage],
        *,
        concurrency: int = 8,
        errors: Errors = "raise",
        progress: Progress = None,
        **options: Unpack[EmbedOptions],
    ) -> NDArray[np.float32]:
        """See `Client.embed`."""
        many = self.features_many(images, concurrency=concurrency, errors=errors, progress=progress, **options)
        return rows([result async for _, result in many])

    async def many(
        self,
        make: Make[T],
        images: Iterable[AnyImage] | AsyncIterable[AnyImage],
        concurrency: int,
        **options: Unpack[ManyOptions],
    ) -> AsyncGenerator[tuple[AnyImage, T | PvtError]]:
        """Each of `images` with its result of the calls that `make` returns; see `predict_many`."""
        check_iterable(images)
        waiting = Waiting[AnyImage, asyncio.Future[T | PvtError]](self._size, concurrency)
        slots, loop, tasks = asyncio.Semaphore(concurrency), asyncio.get_running_loop(), set[asyncio.Task[None]]()

        async def work() -> None:
            async with slots:
                await self._answer(waiting.take(), make)

        async def begun() -> AsyncGenerator[Place[AnyImage, asyncio.Future[T | PvtError]]]:
            async with aclosing(_each(images)) as source:
                async for image in source:
                    waiting.append(image, loop.create_future())
                    tasks.add(task := loop.create_task(work()))
                    task.add_done_callback(tasks.discard)
                    for place in waiting.ready():
                        yield place
            for place in waiting.ready(all_taken=True):
                yield place

        number = 0
        try:
            async with aclosing(begun()) as places:
                async for image, future in places:
                    result = chosen(options.get("errors", "return"), await future, image, number)
                    number += 1
                    if progress := options.get("progress"):
                        progress(1)
                    yield image, result
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, places: Sequence[Place[AnyImage, asyncio.Future[T | PvtError]]], make: Make[T]) -> None:
        """Give each of `places` its result, or the error that is to be raised."""
        try:
            results = await self._results([each.image for each in places], make, several=True)
            for place, result in zip(places, results, strict=True):
                place.future.set_result(result)
        except Exception as error:  # noqa: BLE001  whoever waits for one of these raises it
            for place in places:
                place.future.set_exception(error)
                place.future.exception()  # without a complaint of those for which nobody waits

    async def _results(self, images: Sequence[object], make: Make[T], *, several: bool) -> list[T | PvtError]:
        """Carries out the steps of `group`."""
        steps = group(images, make, self._size, several=several)
        step = next(steps)
        while not isinstance(step, Result):
            read = self._outcome(step) if isinstance(step, Call) else self.prepare(step, images)
            step = steps.send(await read)
        return step.value

    async def _outcome(self, call: Call[T]) -> T | PvtError:
        try:
            return await self.send(call)
        except PvtError as error:
            return error


@dataclass(eq=False, repr=False)
class AsyncClient(Exchange, AsyncCalls):
    """As `Client`, for asyncio; files are read on a thread."""

    transport: httpx.AsyncBaseTransport | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        settings = self.http_settings(httpx.AsyncHTTPTransport)
        self._http = httpx.AsyncClient(**settings | ({"transport": self.transport} if self.transport else {}))
        self._size = RequestSize(self.images_per_request, self.clock.monotonic)

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


async def _each(images: Iterable[AnyImage] | AsyncIterable[AnyImage]) -> AsyncGenerator[AnyImage]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:
        for image in images:
            yield image
