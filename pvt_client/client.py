"""The client for code that waits for each answer."""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
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
from pvt_client.windows import in_threads

T = TypeVar("T")


class Client:
    """A service at `url`, asked over connections that are kept open; threads may share it.

    `timeout`: seconds for each call, all its attempts together; the service is told what is left of it. None: no limit.
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
        self._course = Course(retries or Retries(), clock or Clock(), timeout)
        self._sleep = sleep
        self._http = httpx.Client(**settings(url, api_key), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @overload
    def predict(self, image: Images[AnyImage], **options: Unpack[PredictOptions]) -> list[Prediction | PvtError]: ...

    @overload
    def predict(self, image: Image, **options: Unpack[PredictOptions]) -> Prediction: ...

    def predict(
        self, image: Image | Images[AnyImage], **options: Unpack[PredictOptions]
    ) -> Prediction | list[Prediction | PvtError]:
        """The best classes of a picture; of each of a list in one request, where a bad one becomes its error."""
        if isinstance(image, list | tuple):
            return self._run(calls.predict_each(image, **options))
        return self._run(calls.predict(image, **options))

    def features(self, image: Image | Images[AnyImage], **options: Unpack[FeaturesOptions]) -> Features:
        """The embedding and the stages asked for; of a list stacked, and one bad picture fails them all."""
        return self._run(calls.features(image, **options))

    def explain(self, image: Image, **options: Unpack[ExplainOptions]) -> bytes:
        """The exact class activation map laid over the picture, as a PNG."""
        return self._run(calls.explain(image, **options))

    def explain_map(self, image: Image, **options: Unpack[MapOptions]) -> Explanation:
        """The exact class activation map in numbers."""
        return self._run(calls.explain_map(image, **options))

    def models(self) -> list[Model]:
        """Every model that the service has."""
        return self._run(calls.models())

    def model(self, name: str) -> Model:
        """One model."""
        return self._run(calls.model(name))

    def health(self) -> Health:
        """Whether the service is live and ready, and if not, why."""
        return self._run(calls.health())

    def predict_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[PredictOptions]
    ) -> Generator[tuple[AnyImage, Prediction | PvtError]]:
        """Each of `images` with its best classes, in order, `concurrency` requests at a time.

        A bad picture's error stands in its place; an error that the others would meet too is raised. Only pictures
        that are on their way are in memory, so `images` may be endless.
        """
        return self.many(lambda image: calls.predict(image, **options), images, concurrency=concurrency)

    def features_many(
        self, images: Iterable[AnyImage], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> Generator[tuple[AnyImage, Features | PvtError]]:
        """Each of `images` with its features, in the same way."""
        return self.many(lambda image: calls.features(image, **options), images, concurrency=concurrency)

    def many(
        self, call: Callable[[AnyImage], Call[T]], images: Iterable[AnyImage], *, concurrency: int = 8
    ) -> Generator[tuple[AnyImage, T | PvtError]]:
        """Each of `images` with the answer to the call that is made for it, in the same way."""

        def run(image: AnyImage) -> T | PvtError:
            try:
                return self._run(call(image))
            except OF_ONE_IMAGE as error:
                return error

        return in_threads(run, images, concurrency)

    def _run(self, call: Call[T]) -> T:
        steps = self._course.steps(call)
        came: Answer | PvtError | None = None
        while True:
            try:
                step = steps.send(came)
            except StopIteration as end:
                result: T = end.value
                return result
            came = self._send(step) if isinstance(step, Send) else self._sleep(step.seconds)

    def _send(self, step: Send) -> Answer | PvtError:
        try:
            with closing(self._http.send(step.request(self._http), stream=True)) as response:
                body = bytearray()
                for chunk in response.iter_bytes():  # httpx limits each, not all together
                    body += chunk
                    if self._course.is_late(step):
                        return timed_out(self._course.timeout)
                return Answer(response.status_code, {**response.headers}, bytes(body))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return error_of(error, self._course.timeout)
