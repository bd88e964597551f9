"""What the endpoints that take pictures share: pictures in, a model's answer, notes for headers and log."""

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from app.bodies import FIELD, ImagesBody, Upload, read_uploads
from app.disconnect import cancelled_on_disconnect
from app.preferences import patience_seconds
from service.engine import Engine
from service.errors import ServiceError
from service.pipeline import Image
from service.results import Inferred, Prediction

_BINARY = {"type": "string", "format": "binary"}
# The body is read by `read_uploads`, not by the framework, so its three forms are described here.
BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {FIELD: {"type": "array", "items": _BINARY}},
                "additionalProperties": False,
            }
        },
        "image/png": {"schema": _BINARY},
        "image/jpeg": {"schema": _BINARY},
        "application/octet-stream": {"schema": _BINARY},
        "application/json": {"schema": ImagesBody.model_json_schema()},
    },
}
LARGE = 65_536  # numbers; turning more into bytes would hold up the event loop

T = TypeVar("T")


class Answer(Protocol):
    """What a model gave for all pictures of a request."""

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def results(self) -> Sequence[Inferred | Prediction | ServiceError]: ...  # noqa: D102


R = TypeVar("R")
A = TypeVar("A", bound=Answer)


async def carried_out(
    request: Request, read: Callable[[], Awaitable[R]], infer: Callable[[R], Awaitable[A]]
) -> tuple[R, A]:
    """What `read` takes from the body of `request`, and what `infer` makes of it; given up when the caller hangs up.

    Raises:
        ServiceError: the body can't be read, `infer` failed, or there is one picture and it failed.
    """
    with request.state.engine.request(await patience_seconds(request)):
        what = await read()
        async with cancelled_on_disconnect(request):
            answer = await infer(what)
    _note(request, answer)
    return what, answer


async def answered(request: Request, infer: Callable[[list[Image]], Awaitable[A]]) -> tuple[list[Upload], A]:
    """The pictures of `request`, and what `infer` makes of them; see `carried_out`."""
    settings = request.state.settings

    def read() -> Awaitable[list[Upload]]:
        return read_uploads(request, settings.max_body_bytes, settings.max_images)

    def infer_uploads(uploads: list[Upload]) -> Awaitable[A]:
        return infer([upload.data for upload in uploads])

    return await carried_out(request, read, infer_uploads)


async def encoded(engine: Engine, model: str, make: Callable[[], T], numbers: int = 0) -> T:
    """What `make` turns an answer of so many `numbers` into, a large one on a thread; its time is taken note of."""
    start = perf_counter()
    made = await run_in_threadpool(make) if numbers > LARGE else make()
    engine.encoded(model, perf_counter() - start)
    return made


def _note(request: Request, answer: Answer) -> None:
    """Leave what the middleware writes into headers and log; of several pictures the slowest one's times."""
    results = answer.results
    request.state.log = {"model": answer.model, "images": len(results)}
    there = [result for result in results if not isinstance(result, ServiceError)]
    if there:
        request.state.timing = max((each.timing for each in there), key=sum)._asdict()
    elif len(results) == 1 and isinstance(error := results[0], ServiceError):
        raise error
