"""The client for asyncio."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar, Unpack, overload

import httpx

from pvt_client import calls
from pvt_client.answers import Answer, Explanation, Features, Health, Model, Prediction
from pvt_client.calls import Call
from pvt_client.errors import OF_ONE_IMAGE, PvtError
from pvt_client.exchange import Course, Send, error_of, settings, timed_out
from pvt_client.images import AnyImage, Image, Images
from pvt_client.options import ExplainOptions, FeaturesOptions, MapOptions, PredictOptions
from pvt_client.retries import Clock, Retries
from pvt_client.windows import in_tasks

T = TypeVar("T")


class AsyncClient:
    """The same as `Client`, to be awaited; files are read on a thread."""

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
        self._course = Course(retries or Retries(), clock or Clock(), timeout)
        self._sleep = sleep
        self._http = httpx.AsyncClient(**settings(url, api_key), transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @overload
    async def predict(
        self, image: Images[AnyImage], **options: Unpack[PredictOptions]
    ) -> list[Prediction | PvtError]: ...

    @overload
    async def predict(self, image: Image, **options: Unpack[PredictOptions]) -> Prediction: ...

    async def predict(
        self, image: Image | Images[AnyImage], **options: Unpack[PredictOptions]
    ) -> Prediction | list[Prediction | PvtError]:
        """See `Client.predict`."""
        if isinstance(image, list | tuple):
            return await self._run(lambda: calls.predict_each(image, **options), image)
        return await self._run(lambda: calls.predict(image, **options), image)

    async def features(self, image: Image | Images[AnyImage], **options: Unpack[FeaturesOptions]) -> Features:
        """See `Client.features`."""
        return await self._run(lambda: calls.features(image, **options), image)

    async def explain(self, image: Image, **options: Unpack[ExplainOptions]) -> bytes:
        """See `Client.explain`."""
        return await self._run(lambda: calls.explain(image, **options), image)

    async def explain_map(self, image: Image, **options: Unpack[MapOptions]) -> Explanation:
        """See `Client.explain_map`."""
        return await self._run(lambda: calls.explain_map(image, **options), image)

    async def models(self) -> list[Model]:
        """See `Client.models`."""
        return await self._run(calls.models)

    async def model(self, name: str) -> Model:
        """See `Client.model`."""
        return await self._run(lambda: calls.model(name))

    async def health(self) -> Health:
        """See `Client.health`."""
        return await self._run(calls.health)

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

    def many(
        self, call: Callable[[AnyImage], Call[T]], images: Iterable[AnyImage], *, concurrency: int = 8
    ) -> AsyncGenerator[tuple[AnyImage, T | PvtError]]:
        """See `Client.many`."""

        async def run(image: AnyImage) -> T | PvtError:
            try:
                return await self._run(lambda: call(image), image)
            except OF_ONE_IMAGE as error:
                return error

        return in_tasks(run, images, concurrency)

    async def _run(self, make: Callable[[], Call[T]], image: object = b"") -> T:
        # Anything but bytes is a file to be read, or pixels to be compressed.
        call = make() if isinstance(image, bytes) else await asyncio.to_thread(make)
        steps = self._course.steps(call)
        came: Answer | PvtError | None = None
        while True:
            try:
                step = steps.send(came)
            except StopIteration as end:
                result: T = end.value
                return result
            came = await (self._send(step) if isinstance(step, Send) else self._sleep(step.seconds))

    async def _send(self, step: Send) -> Answer | PvtError:
        try:
            async with asyncio.timeout(step.seconds):  # httpx limits each read, not all together
                response = await self._http.send(step.request(self._http))
        except TimeoutError:
            return timed_out(self._course.timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return error_of(error, self._course.timeout)
        return Answer(response.status_code, {**response.headers}, response.content)
