"""What the endpoints that take images share: their route, their parameters, their request, their response."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints

import mimeparse
from annotated_types import Ge, Le
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from app.bodies import Upload, read_uploads
from app.dependencies import require_key
from app.openapi import IMAGE_PROBLEMS, IMAGES
from app.problems import NotAcceptable, Problem, documented, problem
from service.engine import Engine
from service.errors import ServiceError
from service.lifecycle import time_limit
from service.postprocess.classes import Prediction
from service.results import ImageResult

LARGE = 32_768  # numbers; more, even as JSON on the event loop, would hold it up for over a millisecond and a half
JSON = "application/json"
# What every endpoint that takes images documents.
DOCUMENTED: Mapping[str, Any] = {"openapi_extra": {"requestBody": IMAGES}, "responses": documented(*IMAGE_PROBLEMS)}
# The start of each example of a response.
EXAMPLE_MODEL: dict[str, Any] = {"model": "pvt_v2_b0.digits", "version": "1"}
EXAMPLE_IMAGE: dict[str, Any] = {"filename": "seven.png", "width": 64, "height": 64}

_SIZE = re.compile(r"(?P<height>[1-9]\d{0,4})(x(?P<width>[1-9]\d{0,4}))?", re.ASCII)
_OUT_OF_RANGE = {"greater_than_equal", "less_than_equal"}

T = TypeVar("T")


class Result(Protocol):
    """The results of a model for all images of a request."""

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def results(self) -> Sequence[ImageResult | Prediction | ServiceError]: ...  # noqa: D102


class InferenceRoute(APIRoute):
    """A route that FastAPI documents and that runs as a plain Starlette endpoint.

    The endpoint takes the request and its `query`. Exit stacks and dependencies, which FastAPI's own route has, would
    double what HTTP costs (docs/architecture.md, decision 21).
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:  # noqa: ANN401  FastAPI's
        super().__init__(path, endpoint, **options)
        self._query: type[BaseModel] = get_type_hints(endpoint)["query"]
        self._defaults = self._query()
        self.app = self._run

    @override
    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == self.path:
            return Match.FULL, {"endpoint": self.endpoint, "path_params": {}, "route": self}
        return super().matches(scope)  # mounted below another application, or not allowed

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        if (settings := request.state.settings).api_keys:
            await require_key(request, settings)
        query = self._parsed(request) if scope["query_string"] else self._defaults
        response = await self.endpoint(request, query)
        await response(scope, receive, send)

    def _parsed(self, request: Request) -> BaseModel:
        try:
            return self._query.model_validate(dict(request.query_params))
        except ValidationError as error:
            # In the framework's own words.
            raise RequestValidationError(
                [{**each, "loc": ("query", *each["loc"])} for each in error.errors()]
            ) from error


def _is_size(value: str) -> str:
    if not _SIZE.fullmatch(value):
        raise ValueError("must be a side in pixels, such as 224, or height and width, such as 256x384")
    return value


def _bounds(field: FieldInfo) -> str:
    low = [str(each.ge) for each in field.metadata if isinstance(each, Ge)]
    high = [str(each.le) for each in field.metadata if isinstance(each, Le)]
    return f"from {low[0]} to {high[0]}" if low and high else f"at least {low[0]}" if low else ""


class InferenceQuery(BaseModel):
    """Parameters of every endpoint that takes images."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="wrap")
    @classmethod
    def _in_range(cls, value: object, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
        """As `check`, but the error of a number out of range names the whole range, not the bound that it broke."""
        try:
            return check(value)
        except ValidationError as error:
            bounds = _bounds(cls.model_fields[info.field_name or ""])
            if not bounds or error.errors()[0]["type"] not in _OUT_OF_RANGE:
                raise
            raise PydanticCustomError("out_of_range", "must be {range}", {"range": bounds}) from error

    model: Annotated[
        str | None, Field(description="`<variant>.<tag>`, or a variant alone; the service's default model if absent.")
    ] = None
    size: Annotated[
        str | None,
        AfterValidator(_is_size),
        Field(
            description="The side of the square that images are resized to and cropped to, or `<height>x<width>`: "
            "multiples of 32, up to PVT_MAX_INPUT_SIDE; the model's own size if absent.",
            examples=["224", "256x384"],
        ),
    ] = None
    timeout_ms: Annotated[
        int | None,
        Field(ge=1, le=3_600_000, description="Respond within this time or not at all; default PVT_TIMEOUT_MS."),
    ] = None

    @property
    def timeout_seconds(self) -> float | None:
        """The timeout in seconds."""
        return None if self.timeout_ms is None else self.timeout_ms / 1000

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width; None for the model's own."""
        match = _SIZE.fullmatch(self.size) if self.size else None
        return match and (int(match["height"]), int(match["width"] or match["height"]))


InputSize = Annotated[tuple[int, int], Field(description="Of the model's input: height and width, in pixels.")]


class ImageError(BaseModel):
    """The problem of one image among several."""

    filename: str | None
    error: Problem


def image_error(filename: str | None, error: ServiceError, request_id: str) -> dict[str, object]:
    """An ImageError, for orjson."""
    return {"filename": filename, "error": problem(error, request_id).model_dump()}


def chosen_media_type(request: Request, offered: Sequence[str]) -> str:
    """The media type of `offered`, the default first, that the request's `Accept` prefers.

    Raises:
        NotAcceptable: it allows none of them, or is malformed.
    """
    accept = ", ".join(request.headers.getlist("accept")) or "*/*"
    try:
        best: str = mimeparse.best_match(offered[::-1], accept)  # of equals the last one wins
    except mimeparse.MimeTypeParseException:
        best = ""
    if not best:
        raise NotAcceptable(f"Accept {accept[:200]!r}: this endpoint responds with {', '.join(offered)}")
    return best


@asynccontextmanager
async def uploaded(request: Request, query: InferenceQuery) -> AsyncIterator[list[Upload]]:
    """The images of `request`, those by URL fetched. What runs inside is cancelled when the client disconnects.

    The timeout of `query` is for fetching and what runs inside together; without URLs the engine keeps time.

    Raises:
        ServiceError: the body can't be read, or the engine takes no new work.
        ClientDisconnect: the client is gone.
    """
    state = request.state
    with state.engine.request():
        sent = await read_uploads(request)
        uploads = [each for each in sent if isinstance(each, Upload)]
        async with CancelOnDisconnect(request):
            if len(uploads) == len(sent):
                yield uploads
                return
            async with time_limit(query.timeout_seconds or state.engine.options.timeout_seconds):
                start = perf_counter()
                uploads = await state.fetcher.fetched(sent, state.request_id)
                state.fetch_seconds = perf_counter() - start
                yield uploads


class CancelOnDisconnect:
    """Cancels what runs inside `async with` when the client disconnects; the request's body must have been read.

    Raises:
        ClientDisconnect: the client is gone.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  a coroutine that runs has a task
        self._task = task
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._watcher.cancel()
        if kind is asyncio.CancelledError and self._gone:
            self._task.uncancel()
            raise ClientDisconnect from None

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()


def note(request: Request, result: Result) -> None:
    """Leave what the middleware writes into headers and log; of several images the times of the slowest.

    Raises:
        ServiceError: there is one image, and it failed.
    """
    results, state = result.results, request.state
    state.log = {"model": result.model, "images": len(results)}
    state.images = len(results)
    timings = [each.timing for each in results if not isinstance(each, ServiceError)]
    if timings:
        seconds = getattr(state, "fetch_seconds", None)
        fetch = {} if seconds is None else {"fetch": seconds}
        state.timing = {**fetch, **max(timings, key=sum)._asdict()}
    elif len(results) == 1 and isinstance(error := results[0], ServiceError):
        raise error


async def encoded(request: Request, model: str, make: Callable[[], T], numbers: int = 0) -> T:
    """What `make` makes of a result of so many `numbers`, a large one on a thread; measures its time."""
    state = request.state
    engine: Engine = state.engine
    start = perf_counter()
    content = await engine.encode(make) if numbers > LARGE else make()
    seconds = perf_counter() - start
    engine.encoded(model, seconds)
    if hasattr(state, "timing"):  # every image may have failed
        state.timing["encode"] = seconds
    return content
