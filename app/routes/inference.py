"""What the endpoints that take pictures share: pictures in, a model's answer, notes for headers and log."""

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Protocol, TypeVar

from fastapi import Request

from app.bodies import Link, Upload, read_uploads
from app.disconnect import cancelled_on_disconnect
from service.engine import Engine
from service.errors import ServiceError
from service.lifecycle import time_limit
from service.postprocess.classes import Prediction
from service.results import Image, ImageResult

LARGE = 32_768  # numbers; more, even as JSON on the event loop, would hold it up for over a millisecond and a half

T = TypeVar("T")


class Answer(Protocol):
    """What a model gave for all pictures of a request."""

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def results(self) -> Sequence[ImageResult | Prediction | ServiceError]: ...  # noqa: D102


R = TypeVar("R")
A = TypeVar("A", bound=Answer)


async def carried_out(
    request: Request, read: Callable[[], Awaitable[R]], infer: Callable[[R], Awaitable[A]]
) -> tuple[R, A]:
    """What `read` takes from the body of `request`, and what `infer` makes of it; given up when the caller hangs up.

    Raises:
        ServiceError: the body can't be read, `infer` failed, or there is one picture and it failed.
    """
    with request.state.engine.request():
        what = await read()
        async with cancelled_on_disconnect(request):
            answer = await infer(what)
    _note(request, answer)
    return what, answer


async def answered(
    request: Request, infer: Callable[[list[Image]], Awaitable[A]], timeout_seconds: float | None = None
) -> tuple[list[Upload], A]:
    """The pictures of `request`, those by URL fetched, and what `infer` makes of them; see `carried_out`.

    `timeout_seconds`, the service's default if None, is for fetching and `infer` together; without URLs `infer` keeps
    time by itself.
    """
    settings, uploads = request.state.settings, list[Upload]()

    def read() -> Awaitable[list[Upload | Link]]:
        return read_uploads(request, settings.max_body_bytes, settings.max_images)

    async def infer_sent(sent: list[Upload | Link]) -> A:
        uploads.extend(each for each in sent if isinstance(each, Upload))
        if len(uploads) == len(sent):
            return await infer([upload.data for upload in uploads])
        start = perf_counter()
        async with time_limit(timeout_seconds or request.state.engine.options.timeout_seconds):
            uploads[:] = await request.state.fetcher.fetched(sent, request.state.request_id)
            request.state.fetch_seconds = perf_counter() - start
            return await infer([upload.data for upload in uploads])

    _, answer = await carried_out(request, read, infer_sent)
    return uploads, answer


async def encoded(request: Request, model: str, make: Callable[[], T], numbers: int = 0) -> T:
    """What `make` turns an answer of so many `numbers` into, a large one on a thread; its time is taken note of."""
    engine: Engine = request.state.engine
    start = perf_counter()
    made = await engine.encode(make) if numbers > LARGE else make()
    seconds = perf_counter() - start
    engine.encoded(model, seconds)
    if hasattr(request.state, "timing"):  # every picture may have failed
        request.state.timing["encode"] = seconds
    return made


def _note(request: Request, answer: Answer) -> None:
    """Leave what the middleware writes into headers and log; of several pictures the slowest one's times."""
    results = answer.results
    request.state.log = {"model": answer.model, "images": len(results)}
    there = [result for result in results if not isinstance(result, ServiceError)]
    if there:
        seconds = getattr(request.state, "fetch_seconds", None)
        fetch = {} if seconds is None else {"fetch": seconds}
        request.state.timing = {**fetch, **max((each.timing for each in there), key=sum)._asdict()}
    elif len(results) == 1 and isinstance(error := results[0], ServiceError):
        raise error
