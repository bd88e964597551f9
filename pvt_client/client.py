"""`Client`, which waits for each response.

It carries out the steps of `Exchange.steps` and of `batching.group`, and has the functions of `pvt_client.calls` as its
methods.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Concatenate, ParamSpec, Self, TypeVar, Unpack, cast, overload

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


def _sent(make: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]:
    """A method of `Client` that sends the call that `make` returns."""

    @wraps(make)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(make(*args, **kwargs))

    return method


@dataclass(eq=False, repr=False)
class Client(Exchange):
    """A client of the service at `url`. It keeps connections open, and threads may share it.

    `timeout`: seconds for each request, all its attempts together; the service is sent what is left of it. None: no
    limit. Every method raises PvtError, see `pvt_client.errors`.
    """

    transport: httpx.BaseTransport | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        settings = self.http_settings(httpx.HTTPTransport)
        self._http = httpx.Client(**settings | ({"transport": self.transport} if self.transport else {}))
        self._size = RequestSize(self.images_per_request, self.clock.monotonic)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    embedding = _sent(calls.embedding)
    explain = _sent(calls.explain)
    explain_map = _sent(calls.explain_map)
    models = _sent(calls.models)
    model = _sent(calls.model)
    health = _sent(calls.health)

    @overload
    def predict(
        self, image: Images[AnyImage], *, errors: Errors = "return", **options: Unpack[PredictOptions]
    ) -> list[Prediction | PvtError]: ...

    @overload
    def predict(self, image: Image, *, errors: Errors = "return", **options: Unpack[PredictOptions]) -> Prediction: ...

    def predict(
        self, image: Image | Images[AnyImage], *, errors: Errors = "return", **options: Unpack[PredictOptions]
    ) -> Prediction | list[Prediction | PvtError]:
        """The best classes of an image; of a list, or of an array (N, H, W, C), those of each image, in one request.

        The error of a bad image takes its place in the list, or with `errors="raise"` is raised. What is more than the
        service takes in a request is sent in several.
        """
        if (images := batch(image)) is None:
            return self.send(calls.predict(cast("Image", image), **options))
        results = self._results(images, partial(calls.predictions, **options), several=False)
        return [chosen(errors, *each) for each in zip(results, images, range(len(images)), strict=True)]

    def features(self, image: Image | Images[AnyImage], **options: Unpack[FeaturesOptions]) -> Features:
        """The embedding and the requested stages; those of a list are stacked, and one bad image fails them all."""
        if (images := batch(image)) is None:
            return self.send(calls.features(cast("Image", image), **options))
        return stacked(self._results(images, partial(calls.features_of, **options), several=False), images)

    def predict_many(
        self,
        images: Iterable[AnyImage],
        *,
        concurrency: int = 8,
        errors: Errors = "return",
        progress: Progress = None,
        **options: Unpack[PredictOptions],
    ) -> Generator[tuple[AnyImage, Prediction | PvtError]]:
        """Each of `images` with its best classes, in order, `concurrency` requests at a time.

        A request carries as many images as the service answers within a quarter of a second, `images_per_request` at
        the most. The error
        of a bad image takes its place, or with `errors="raise"` is raised; an error that the other images would meet
        too always is. Images are taken as results are consumed, so `images` may be endless.
        """
        make = partial(calls.predictions, **options)
        return self._many(make, images, concurrency, errors=errors, progress=progress)

    def features_many(
        self,
        images: Iterable[AnyImage],
        *,
        concurrency: int = 8,
        errors: Errors = "return",
        progress: Progress = None,
        **options: Unpack[FeaturesOptions],
    ) -> Generator[tuple[AnyImage, Features | PvtError]]:
        """Each of `images` with its features; see `predict_many`."""
        make = partial(calls.features_of, **options)
        return self._many(make, images, concurrency, errors=errors, progress=progress)

    def embedding_many(
        self,
        images: Iterable[AnyImage],
        *,
        concurrency: int = 8,
        errors: Errors = "return",
        progress: Progress = None,
        **options: Unpack[FeaturesOptions],
    ) -> Generator[tuple[AnyImage, Embedding | PvtError]]:
        """Each of `images` with its embedding and its size; see `predict_many`."""
        make = partial(calls.embeddings, **options)
        return self._many(make, images, concurrency, errors=errors, progress=progress)

    def embed(
        self,
        images: Iterable[AnyImage],
        *,
        concurrency: int = 8,
        errors: Errors = "raise",
        progress: Progress = None,
        **options: Unpack[EmbedOptions],
    ) -> NDArray[np.float32]:
        """The embeddings of `images`, (N, C), in order; (0, 0) of none.

        The error of a bad image is raised, or with `errors="return"` its row is NaN; if all are bad, it is raised too.

        Raises:
            ModelChanged: they are not all of one version of the model.
        """
        many = self.features_many(images, concurrency=concurrency, errors=errors, progress=progress, **options)
        return rows([result for _, result in many])

    def _many(
        self, make: Make[T], images: Iterable[AnyImage], concurrency: int, **options: Unpack[ManyOptions]
    ) -> Generator[tuple[AnyImage, T | PvtError]]:
        check_iterable(images)
        waiting = Waiting[AnyImage, Future[T | PvtError]](self._size, concurrency)
        pool = ThreadPoolExecutor(concurrency, "pvt-client")

        def begun() -> Generator[Place[AnyImage, Future[T | PvtError]]]:
            for image in images:
                waiting.append(image, Future())
                pool.submit(lambda: self._answer(waiting.take(), make))
                yield from waiting.ready()
            yield from waiting.ready(all_taken=True)

        try:
            for number, (image, future) in enumerate(begun()):
                result = chosen(options.get("errors", "return"), future.result(), image, number)
                if progress := options.get("progress"):
                    progress(1)
                yield image, result
        finally:
            waiting.clear()
            pool.shutdown(cancel_futures=True)

    def _answer(self, places: Sequence[Place[AnyImage, Future[T | PvtError]]], make: Make[T]) -> None:
        """Give each of `places` its result, or the error that is to be raised."""
        try:
            results = self._results([each.image for each in places], make, several=True)
            for place, result in zip(places, results, strict=True):
                place.future.set_result(result)
        except BaseException as error:  # noqa: BLE001  whoever waits for one of these raises it
            for place in places:
                place.future.set_exception(error)

    def _results(self, images: Sequence[object], make: Make[T], *, several: bool) -> list[T | PvtError]:
        """Carries out the steps of `group`."""
        steps = group(images, make, self._size, several=several)
        step = next(steps)
        while not isinstance(step, Result):
            step = steps.send(self._outcome(step) if isinstance(step, Call) else step())
        return step.value

    def _outcome(self, call: Call[T]) -> T | PvtError:
        try:
            return self.send(call)
        except PvtError as error:
            return error

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
