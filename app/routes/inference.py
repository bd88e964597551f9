"""What the endpoints that take images share: their route, their parameters, their request, their response."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from time import perf_counter
from types import TracebackType
from typing import Annotated, Any, TypeVar, get_type_hints

import mimeparse
from annotated_types import Ge, Le
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from app.bodies import FIELD, Link, Upload, read_uploads
from app.caching import cache_status, cache_use, tagged
from app.dependencies import max_wait_seconds, require_key
from app.encodings import chunks
from app.problems import NotAcceptable, expected
from app.proxies import base_url
from app.strict import Strict
from service.engine import DefaultSize, Engine, TimeLimit
from service.errors import ServiceError
from service.memory import ANSWERS, BODIES, Reservation
from service.results import InferenceResult
from service.store.cards import ModelCard

LARGE = 32_768  # numbers; more, even as JSON on the event loop, would hold it up for over a millisecond and a half
WATCH_AFTER_SECONDS = 0.02  # a request that is over by then costs no task that watches its client
JSON = "application/json"
LOAD_SECONDS = 0.001  # a request that gets its model later has waited for it
BYTES_PER_NUMBER = 13  # as JSON: nine digits, a sign, a point, an exponent or zeros, a comma

_SIZE = re.compile(r"(?P<height>[1-9]\d{0,4})(x(?P<width>[1-9]\d{0,4}))?", re.ASCII)

T = TypeVar("T")


class InferenceRoute(APIRoute):
    """A route that FastAPI documents and that runs as a plain Starlette endpoint.

    The endpoint takes the request and its `query`. Exit stacks and dependencies, which FastAPI's own route has, would
    double what HTTP costs (docs/decisions/http.md, decision 21).
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:  # noqa: ANN401  FastAPI's
        super().__init__(path, endpoint, **options)
        self._query: type[InferenceQuery] = get_type_hints(endpoint)["query"]
        self._defaults = self._query()
        self.app = self._run

    @override
    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == self.path:
            return Match.FULL, {"endpoint": self.endpoint, "path_params": {}, "route": self}
        return super().matches(scope)  # mounted below another application, or not allowed

    @override
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            there = base_url(scope) + self.path
            way = f"it takes POST, of a file: curl -F {FIELD}=@FILE {there}, or curl -X POST -T FILE {there}"
            raise HTTPException(405, way)
        await self.app(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, state = Request(scope, receive, send), scope["state"]
        if (settings := state["settings"]).api_keys:
            await require_key(request, settings)
        try:
            query = self._query.model_validate(dict(request.query_params)) if scope["query_string"] else self._defaults
        except ValidationError as error:
            in_query = [{**each, "loc": ("query", *each["loc"])} for each in error.errors()]
            raise RequestValidationError(in_query) from error  # in the framework's own words
        refused = state["engine"].refusal(
            model=query.model,
            size=query.input_size,
            default_size=query.default_size,
            timeout_seconds=query.timeout_ms and query.timeout_ms / 1000,
            client=state["client"],
        )
        response = await (expected(request, refused) if refused else self.endpoint(request, query))
        if settings.cache_mb:
            response = await tagged(request, response)
        await response(scope, receive, send)


def _is_size(value: str) -> str:
    if not _SIZE.fullmatch(value):
        raise ValueError("must be a side in pixels, such as 224, or height and width, such as 256x384")
    return value


class InferenceQuery(Strict):
    """Parameters of every endpoint that takes images."""

    @field_validator("*", mode="wrap")
    @classmethod
    def _in_range(cls, value: object, check: Callable[[object], object], info: ValidationInfo) -> object:
        """As `check`, but the error of a number out of range names the whole range, not the bound that it broke."""
        try:
            return check(value)
        except ValidationError as error:
            limits = cls.model_fields[info.field_name or ""].metadata
            low = [each.ge for each in limits if isinstance(each, Ge)]
            high = [each.le for each in limits if isinstance(each, Le)]
            if not low or error.errors()[0]["type"] not in {"greater_than_equal", "less_than_equal"}:
                raise
            bounds = f"from {low[0]} to {high[0]}" if high else f"at least {low[0]}"
            raise PydanticCustomError("out_of_range", "must be {range}", {"range": bounds}) from error

    model: Annotated[
        str | None, Field(description="`<variant>.<tag>`, or a variant alone; the service's default model if absent.")
    ] = None
    size: Annotated[
        str | None,
        AfterValidator(_is_size),
        Field(
            description="The side of the square that images are resized to and cropped to, or `<height>x<width>`: "
            "multiples of 32, up to PVT_MAX_INPUT_SIDE. If absent, the model's own size; for `/explain` the "
            "`explain_size` of its card, where it has one.",
            examples=["224", "256x384"],
        ),
    ] = None
    timeout_ms: Annotated[
        int | None,
        Field(ge=1, le=3_600_000, description="Respond within this time or not at all; default PVT_TIMEOUT_MS."),
    ] = None

    @property
    def default_size(self) -> DefaultSize | None:
        """The size for a model where the query names none; None is the model's own."""
        return None

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width, where the query names them."""
        match = _SIZE.fullmatch(self.size) if self.size else None
        return match and (int(match["height"]), int(match["width"] or match["height"]))


def chosen_media_type(request: Request, offered: Sequence[str]) -> str:
    """The media type of `offered`, the default first, that the request's `Accept` prefers; raises NotAcceptable."""
    if not (best := preferred_media_type(request, offered)):
        accept = ", ".join(request.headers.getlist("accept"))
        raise NotAcceptable(f"Accept {accept[:200]!r}: this endpoint responds with {', '.join(offered)}")
    return best


def preferred_media_type(request: Request, offered: Sequence[str]) -> str:
    """The same, and empty where it allows none of them."""
    try:
        # Of equals the last one wins.
        best: str = mimeparse.best_match(offered[::-1], ", ".join(request.headers.getlist("accept")) or "*/*")
    except mimeparse.MimeTypeParseException:
        best = ""
    return best


async def infer(
    request: Request,
    query: InferenceQuery,
    *,
    stages: bool = False,
    check: Callable[[ModelCard], None] = lambda _: None,
    check_count: Callable[[int], None] | None = None,
) -> tuple[list[str | None], InferenceResult]:
    """Read the images of `request`, fetch those by URL, and infer: their file names, and the result.

    `check` is the engine's; `check_count` is called with the number of images, and may raise. The timeout of `query`
    is for fetching and inference together. Raises what reading and `Engine.infer` raise, and ClientDisconnect.
    """
    engine = request.state.engine
    with engine.request(), engine.memory.reserve(0, BODIES) as held:
        sent = await read_uploads(request, held)
        if check_count:
            check_count(len(sent))
        return await infer_images(request, query, sent, held, stages=stages, check=check)


async def infer_images(
    request: Request,
    query: InferenceQuery,
    sent: list[Upload | Link],
    held: Reservation,
    *,
    stages: bool = False,
    check: Callable[[ModelCard], None] = lambda _: None,
) -> tuple[list[str | None], InferenceResult]:
    """The second half of `infer`, for images that were read, and for whose bytes `held` reserves memory."""
    state, engine = request.state, request.state.engine
    timeout = query.timeout_ms and query.timeout_ms / 1000
    uploads = [each for each in sent if isinstance(each, Upload)]
    fetches = len(uploads) < len(sent)
    limit = TimeLimit(timeout or engine.options.timeout_seconds) if fetches else nullcontext()
    async with CancelOnDisconnect(request), limit:
        if fetches:
            start = perf_counter()
            try:
                uploads = await state.fetcher.fetched(sent, state.request_id, state.client, held)
            finally:
                state.fetch = start, perf_counter()
        result: InferenceResult = await engine.infer(
            [upload.data for upload in uploads],
            model=query.model,
            size=query.input_size,
            default_size=query.default_size,
            stages=stages,
            check=check,
            max_wait_seconds=await max_wait_seconds(request),
            timeout_seconds=timeout,
            client=state.client,
            held=hold_answer(request) if stages else None,
            cache=cache_use(request),
            admitting=partial(note_arrival, request),
        )
    note(request, result)
    return [upload.filename for upload in uploads], result


class CancelOnDisconnect:
    """Cancels what runs inside when the client disconnects, and raises ClientDisconnect. The body must have been read.

    A class rather than a generator, which costs each request several times as much.
    """

    __slots__ = ("_gone", "_request", "_task", "_timer", "_watcher")

    def __init__(self, request: Request) -> None:
        self._request = request
        # Mutable state, once it is entered: the task that may be cancelled, whether the client has gone, and what
        # watches it.
        self._task: asyncio.Task[Any] = request.scope["state"]["task"]
        self._gone = False
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        """See the class."""
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._begin)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See the class."""
        if self._timer:
            self._timer.cancel()
        if self._watcher:
            self._watcher.cancel()
        self._timer = self._watcher = None  # which lead back to this, and so to the request
        if self._gone and isinstance(error, asyncio.CancelledError):
            self._task.uncancel()
            raise ClientDisconnect from None

    def _begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()


def note_arrival(request: Request, model: str, version: str, queue: int) -> None:
    """Leave which model the request has got, and how many images it found there, whatever becomes of it."""
    request.scope["state"]["log"] = {"model": model, "version": version, "queue_at_arrival": queue}


def note(request: Request, result: InferenceResult) -> None:
    """Leave what the middleware writes into headers and log; of several images the times of the slowest.

    Raises the error of an image that failed alone.
    """
    results = result.results
    state: dict[str, Any] = request.scope["state"]  # whose attributes would cost several times as much
    log = state["log"]
    log["images"] = state["images"] = len(results)
    if status := cache_status(request, result):
        state["cache_status"] = status
        log["cache"] = status.partition("; ")[2]
    answered = [each for each in results if not isinstance(each, ServiceError)]
    if answered:
        last = max(answered, key=lambda each: sum(each.timing)) if len(answered) > 1 else answered[0]
        slowest = last.timing
        log["pixels"] = sum([each.width * each.height for each in answered])
        log["batch_size"], log["batch_reason"] = last.batch_size, last.batch_reason
        before = (("read", state.get("read")), ("fetch", state.get("fetch")))
        timing = state["timing"] = {stage: times[1] - times[0] for stage, times in before if times}
        if result.load_seconds > LOAD_SECONDS:
            timing["load"] = result.load_seconds
        timing.update(zip(slowest._fields, slowest, strict=True))
        timing["wait"] += state["begin_seconds"]
    elif len(results) == 1 and isinstance(error := results[0], ServiceError):
        raise error


def hold_answer(request: Request) -> Reservation:
    """The memory that is reserved for the response; the middleware releases it once that is sent, or given up."""
    state: dict[str, Any] = request.scope["state"]
    held: Reservation = state.setdefault("answer", state["engine"].memory.reserve(0, ANSWERS))
    return held


async def answer(
    request: Request,
    result: InferenceResult,
    pieces: Iterator[bytes],
    numbers: int,
    media_type: str,
    *,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response made of `pieces`, which encode so many `numbers` of `result`.

    A large one is encoded on a thread, chunk by chunk as its client takes them. `Server-Timing` then has the time of
    the first two.

    Raises:
        MemoryExhausted: the client speaks HTTP/1.0, which has no chunks, and there is no room for the whole.
    """
    if numbers <= LARGE:
        body = await encoded(request, result, partial(b"".join, pieces))
        return Response(body, headers=headers, media_type=media_type)
    engine: Engine = request.state.engine
    if request.scope["http_version"] == "1.0":
        hold_answer(request).grow(BYTES_PER_NUMBER * numbers)
        body = await encoded(request, result, partial(b"".join, pieces), numbers)
        return Response(body, headers=headers, media_type=media_type)
    parts = chunks(pieces)
    begun = await encoded(request, result, lambda: [*islice(parts, 2)], numbers)
    if len(begun) < 2:  # noqa: PLR2004  that is all of it
        return Response(b"".join(begun), headers=headers, media_type=media_type)

    async def body_chunks() -> AsyncIterator[bytes]:
        while begun:
            yield begun.pop(0)
        while chunk := await engine.encode(partial(next, parts, b"")):
            yield chunk

    return StreamingResponse(body_chunks(), headers=headers, media_type=media_type)


async def encoded(request: Request, result: InferenceResult, encode: Callable[[], T], numbers: int = 0) -> T:
    """What `encode` returns, which encodes so many `numbers` of `result`: many on a thread. Measures its time."""
    state: dict[str, Any] = request.scope["state"]
    engine: Engine = state["engine"]
    start = perf_counter()
    content = await engine.encode(encode) if numbers > LARGE else encode()
    state["encode"] = start, (end := perf_counter())
    seconds = end - start
    engine.encoded(result.model, seconds)
    if timing := state.get("timing"):  # every image may have failed
        timing["encode"] = seconds
    return content
