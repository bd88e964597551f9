"""What the endpoints that take pictures share: pictures in, a model's answer, notes for headers and log."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Protocol, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from app.bodies import Upload, read_uploads
from app.disconnect import cancelled_on_disconnect
from service.engine import Engine
from service.errors import ServiceError
from service.pipeline import Image
from service.requests import time_limit
from service.results import Inferred, Prediction

LARGE = 65_536  # numbers; turning more into bytes would hold up the event loop

T = TypeVar("T")


class Answer(Protocol):
    """What a model gave for all pictures of a request."""

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def results(self) -> Sequence[Inferred | Prediction | ServiceError]: ...  # noqa: D102


A = TypeVar("A", bound=Answer)


async def answered(
    request: Request,
    engine: Engine,
    infer: Callable[[list[Image]], Awaitable[A]],
    timeout_seconds: float | None = None,
) -> tuple[list[Upload], A]:
    """The pictures of `request`, and what `infer` makes of them, which is given up when the caller hangs up.

    `timeout_seconds`, the service's default if None, is for fetching by URL and `infer` together; without URLs `infer`
    keeps time by itself.

    Raises:
        ServiceError: the body can't be read, `infer` failed, or there is one picture and it failed.
    """
    settings, fetch_seconds = request.state.settings, None
    with engine.request():
        sent = await read_uploads(request, settings.max_body_bytes, settings.max_images)
        uploads = [each for each in sent if isinstance(each, Upload)]
        linked = len(uploads) < len(sent)
        limit = time_limit(timeout_seconds or engine.options.timeout_seconds) if linked else nullcontext()
        async with cancelled_on_disconnect(request), limit:
            if linked:
                start = perf_counter()
                uploads = await request.state.fetcher.fetched(sent, request.state.request_id)
                fetch_seconds = perf_counter() - start
            answer = await infer([upload.data for upload in uploads])
    _note(request, answer, fetch_seconds)
    return uploads, answer


async def encoded(engine: Engine, model: str, make: Callable[[], T], numbers: int = 0) -> T:
    """What `make` turns an answer of so many `numbers` into, a large one on a thread; its time is taken note of."""
    start = perf_counter()
    made = await run_in_threadpool(make) if numbers > LARGE else make()
    engine.encoded(model, perf_counter() - start)
    return made


def _note(request: Request, answer: Answer, fetch_seconds: float | None) -> None:
    """Leave what the middleware writes into headers and log; of several pictures the slowest one's times."""
    results = answer.results
    request.state.log = {"model": answer.model, "images": len(results)}
    there = [result for result in results if not isinstance(result, ServiceError)]
    if there:
        fetch = {} if fetch_seconds is None else {"fetch": fetch_seconds}
        request.state.timing = {**fetch, **max((each.timing for each in there), key=sum)._asdict()}
    elif len(results) == 1 and isinstance(error := results[0], ServiceError):
        raise error
