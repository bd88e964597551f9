"""Where HTTP meets errors: their status, their body (RFC 9457, or another protocol's form), their one handler."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from math import ceil
from typing import Annotated, Any

import structlog
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from app.alternatives import alternative, methods
from app.disclosure import shown
from service import errors
from service.memory import RETRY_SECONDS

log = structlog.get_logger(component="http")

MEDIA_TYPE = "application/problem+json"
# The errors of this service, and the refusals of the framework.
EXPECTED = (errors.ServiceError, RequestValidationError, HTTPException, ClientDisconnect)
CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that disconnected
_MOST_REASONS = 5  # of what is wrong with one request


class UnsupportedMediaType(errors.ServiceError):
    """The body's content type is none that the endpoint reads."""


class UnsupportedContentEncoding(UnsupportedMediaType):
    """The body's `Content-Encoding` is none that is read; `Accept-Encoding` of the response names those that are."""


class NotAcceptable(errors.ServiceError):
    """The endpoint has no form of response that the client accepts."""


class BodyTooLarge(errors.ImageTooLarge):
    """The request body exceeds PVT_MAX_BODY_MB."""


class TooManyImages(errors.InvalidRequest):
    """The request has more images than PVT_MAX_IMAGES."""


class ImageUrlRefused(errors.InvalidRequest):
    """An image's URL is one that this service does not fetch; the message says why."""


class ImageUnreachable(errors.ServiceError):
    """An image's URL was requested and returned no image; the message says how far that got."""


class ImageTimedOut(ImageUnreachable):
    """An image's URL did not return it within PVT_URL_TIMEOUT_MS."""


class ImageHostBusy(errors.ServiceError):
    """An image's URL was not requested: its host, or the client, has its share of images under way."""


class AnswerUnchanged(errors.ServiceError):
    """The answer to a POST is the one whose tag its `If-None-Match` names."""


class Unauthorized(errors.ServiceError):
    """The request carries no valid key."""


class Forbidden(errors.ServiceError):
    """The service is configured to refuse this to everyone; the message names the setting."""


class ClientLimitExceeded(errors.ServiceError):
    """The client has sent too much (PVT_CLIENT_RATE), or has too many requests under way (PVT_CLIENT_CONCURRENCY)."""

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class TooManyStreams(ClientLimitExceeded):
    """As many streams of events are open as a process serves."""


class MalformedRequest(errors.ServiceError):
    """What came over the connection is no HTTP/1.1 request, or one that can be read in two ways."""


class RequestTimeout(errors.ServiceError):
    """A request's head or body came too slowly, see PVT_CLIENT_TIMEOUT_SECONDS."""


class HeadTooLarge(errors.ServiceError):
    """A request's head, or what its chunks bring along beside their data, exceeds 64 KiB."""


class TargetTooLong(errors.ServiceError):
    """A request's target makes its head exceed 64 KiB."""


class ExpectationFailed(errors.ServiceError):
    """The request has an `Expect` other than 100-continue."""


class UnsupportedRequest(errors.ServiceError):
    """The request is a CONNECT, of an unknown method, or has a transfer coding other than chunked."""


class ExtensionUnsupported(errors.ServiceError):
    """The request is for a part of the Open Inference Protocol's extensions that this service has not."""


class UnsupportedVersion(errors.ServiceError):
    """The request is of a version of HTTP other than 1.0 and 1.1."""


_UNAVAILABLE = (errors.WeightsUnavailable, errors.AliasesInvalid, errors.StoreNotWritable, errors.ModelLoadFailed,
                errors.ModelLoading, errors.MemoryBudgetExceeded, errors.MemoryExhausted, errors.OutOfMemory,
                errors.DeviceFailed, errors.ShuttingDown, ImageHostBusy)  # fmt: skip
# The nearest class in an error's ancestry decides.
STATUS: Mapping[type[Exception], int] = {
    MalformedRequest: 400,
    Unauthorized: 401,
    Forbidden: 403,
    errors.ModelNotFound: 404,
    NotAcceptable: 406,
    RequestTimeout: 408,
    errors.ModelPinned: 409,
    AnswerUnchanged: 412,
    errors.ImageTooLarge: 413,
    TargetTooLong: 414,
    UnsupportedMediaType: 415,
    ExpectationFailed: 417,
    errors.InvalidRequest: 422,
    errors.QueueFull: 429,
    ClientLimitExceeded: 429,
    HeadTooLarge: 431,
    UnsupportedRequest: 501,
    ExtensionUnsupported: 501,
    ImageUnreachable: 502,
    **dict.fromkeys(_UNAVAILABLE, 503),
    errors.DeadlineExceeded: 504,
    ImageTimedOut: 504,
    UnsupportedVersion: 505,
}


class Problem(BaseModel):
    """An error as RFC 9457 problem details."""

    type: Annotated[str, Field(description="A URN that stays the same for this kind of error.")]
    title: Annotated[str, Field(description="The kind of error, for people.")]
    status: Annotated[int, Field(description="The HTTP status.")]
    detail: Annotated[str, Field(description="What was wrong, which setting rules it, what to do.")]
    request_id: Annotated[str | None, Field(description="The request's `X-Request-ID`.")] = None


MEANING: Mapping[int, str] = {
    401: "A key is required (PVT_API_KEYS, or PVT_MANAGEMENT_KEYS for management).",
    403: "Management is off or on another port (PVT_MANAGEMENT_*), or another site's page sent it (PVT_CORS_ORIGINS).",
    404: "No such model.",
    406: "No form of response that `Accept` allows.",
    409: "The model is pinned in memory.",
    412: "The answer is the one whose `ETag` the request's `If-None-Match` names.",
    413: "The body or an image exceeds a limit.",
    415: "Unsupported form of body.",
    422: "A parameter or an image is wrong.",
    429: "The model's queue is full, or the client is at its limit; `Retry-After` says when to send the request again.",
    500: "Unexpected; the log has it under the request id.",
    502: "An image's URL returned no image.",
    503: "The model is unavailable, or the service is shutting down; `Retry-After` says when it may be available.",
    504: "No result within `timeout_ms`, or an image not fetched within PVT_URL_TIMEOUT_MS.",
}

# Other statuses below 500 are an invalid_request_error, as they are with OpenAI, and those above a server_error.
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_OPENAI_CODES = {"unauthorized": "invalid_api_key"}
_OPENAI_PARAMETER = re.compile(
    r"(input|model|encoding_format|embedding_type|dimensions|modality|normalized?)\b[^:]{0,100}:"
)
_OPENAI_PARAMETERS = {"model_not_found": "model"} | dict.fromkeys(
    ("invalid_image", "image_too_large", "image_url_refused", "image_unreachable", "image_timed_out"), "input"
)


class OpenInferenceError(BaseModel):
    """An error in the form of the Open Inference Protocol."""

    error: str


class OpenAiReason(BaseModel):
    """What went wrong; `param` names the field of the request, where one is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAiError(BaseModel):
    """An error in OpenAI's form."""

    error: OpenAiReason


# The forms that the protocols under these paths give an error.
PREDICT = ":predict"  # ends paths of KServe's version 1, which lie under OpenAI's
DIALECTS: Mapping[str, type[BaseModel]] = {"/v2": OpenInferenceError, "/v1": OpenAiError, PREDICT: OpenInferenceError}


def dialect(path: str) -> type[BaseModel] | None:
    """The form of an error that clients of the protocol under `path` expect; None where it is ours."""
    prefix = "/" + path[1:].partition("/")[0]
    return DIALECTS.get(PREDICT if prefix == "/v1" and path.endswith(PREDICT) else prefix)


def translated(path: str, problem: Problem) -> tuple[int, BaseModel] | None:
    """Status and body of `problem` in the protocol under `path`, which has no 422; None where the form is ours."""
    form = dialect(path)
    if form is None:
        return None
    status = HTTPStatus.BAD_REQUEST.value if problem.status == HTTPStatus.UNPROCESSABLE_ENTITY else problem.status
    if form is OpenInferenceError:
        return status, OpenInferenceError(error=problem.detail)
    code = problem.type.rpartition(":")[2].replace("-", "_")
    named = _OPENAI_PARAMETER.match(problem.detail)
    param = _OPENAI_PARAMETERS.get(code) or (named and named[1])
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    kind, code = _OPENAI_TYPES.get(status, kind), _OPENAI_CODES.get(code, code)
    return status, OpenAiError(error=OpenAiReason(message=problem.detail, type=kind, param=param, code=code))


_SAMPLE_ID = "e0a4aa4ff30f41ab9122180526e30d37"
# Details for the examples of the OpenAPI document; the others show the docstring of their class.
_SAMPLES: Mapping[type[Exception], str] = {
    errors.InvalidRequest: "query top_k: must be from 1 to 1000",
    errors.InvalidImage: "not a supported image (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIF)",
    errors.DeadlineExceeded: "no answer within 100 ms; allow more with timeout_ms or PVT_TIMEOUT_MS",
    errors.ShuttingDown: "the service is shutting down and takes no new work; send the request again",
    ImageUrlRefused: "images by URL are off; PVT_URL_HOSTS is to name the hosts that they may come from",
    ImageUnreachable: "the URL's host example.org answered 404",
    ImageHostBusy: "the URL's host example.org has as many images under way as it may have, and none arrived within "
    "5 s (half of PVT_URL_TIMEOUT_MS); send this one again later",
    ImageTimedOut: "the URL's host example.org did not send the image within the 10 s of PVT_URL_TIMEOUT_MS",
    BodyTooLarge: "the request body is larger than 32 MB, which PVT_MAX_BODY_MB allows",
    TooManyImages: "more than 64 images in one request, which PVT_MAX_IMAGES allows",
    Forbidden: "management is off; set PVT_MANAGEMENT_KEYS to one or more keys to turn it on",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may return these problems, by reference to those that `app.openapi` describes."""
    return {status: {"$ref": f"#/components/responses/problem_{status}"} for status in statuses}


def refusals(prefix: str, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a route of another protocol, under `prefix`."""
    meaning = {400: "The request, a parameter or an image is wrong.", **MEANING}
    return {status: {"model": DIALECTS[prefix], "description": meaning[status]} for status in statuses}


def examples(status: int) -> dict[str, dict[str, Any]]:
    """An example of every problem that has this status, for the OpenAPI document; named by the problem's type."""
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return {"internal-error": {"summary": MEANING[500], "value": problem(Exception(), _SAMPLE_ID).model_dump()}}
    found = {}
    for kind in kinds():
        summary = (kind.__doc__ or "").partition("\n")[0]
        sample = problem(kind.__new__(kind, _SAMPLES.get(kind, summary)), _SAMPLE_ID)
        if sample.status == status:
            found[sample.type.rpartition(":")[2]] = {"summary": summary, "value": sample.model_dump()}
    return dict(sorted(found.items()))


def kinds(base: type[Exception] = errors.ServiceError) -> list[type[Exception]]:
    """Every class of error below `base`."""
    return [kind for child in base.__subclasses__() for kind in (child, *kinds(child))]


def problem(error: Exception, request_id: str | None = None) -> Problem:
    """What a client learns of `error`: everything about one of ours, nothing about any other."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return _problem(type(error).__name__, STATUS[kind], str(error), request_id)
    return _problem("InternalError", 500, "an unexpected error; the log has it under this request id", request_id)


async def expected(request: Request, error: Exception) -> Response:
    """The response to one of EXPECTED, and a note of it for the request's log line."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # no client reads it; it is for log and metrics
    request_id = request.state.request_id
    if isinstance(error, RequestValidationError):
        body = problem(errors.InvalidRequest(_reasons(error)), request_id)
    elif isinstance(error, HTTPException):
        path = request.state.path
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED or path == "*":
            allow = {"Allow": ", ".join(sorted(methods(request.scope, path)))}
            if request.method == "OPTIONS":
                return Response(status_code=int(HTTPStatus.NO_CONTENT), headers=allow)
            error = HTTPException(error.status_code, error.detail, allow)
        detail = f"{request.method} {request.url.path}: {error.detail}{alternative(request.scope, error)}"
        body = _problem(HTTPStatus(error.status_code).phrase, error.status_code, detail, request_id)
    else:
        body = problem(error, request_id)
        _note(request, body)  # the log has whole paths
        return _response(
            request.scope, body.model_copy(update={"detail": shown(request, body.detail)}), _headers(error)
        )
    _note(request, body)
    return _response(request.scope, body, _headers(error))


def _note(request: Request, body: Problem) -> None:
    """Add to what the request's log line has already: which model it got, for one."""
    request.scope["state"].setdefault("log", {}).update(problem=body.title, detail=body.detail)


def unexpected(error: Exception, scope: Scope) -> Response:
    """The response to any other error: the log has everything, the client learns nothing.

    Memory that ran out is no fault of the code: the request may succeed when others have ended.
    """
    request_id = scope["state"]["request_id"]
    if isinstance(error.__cause__, errors.MemoryExhausted):  # where a response was to begin; the framework wraps it
        error = error.__cause__
    if isinstance(error, MemoryError):
        log.warning("memory_exhausted", request_id=request_id, exc_info=error)
        error = errors.MemoryExhausted("memory ran out while this was done; send it again later, or less at a time",
                                       retry_after_seconds=RETRY_SECONDS)  # fmt: skip
    if isinstance(error, errors.MemoryExhausted):
        return _response(scope, problem(error, request_id), _headers(error))
    log.error("unexpected_error", request_id=request_id, exc_info=error)
    scope["state"]["exception"] = type(error).__qualname__  # for the trace
    return _response(scope, problem(error, request_id))


def _problem(name: str, status: int, detail: str, request_id: str | None) -> Problem:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    kind = f"urn:pvt-serve:problem:{words.replace(' ', '-').lower()}"
    return Problem(type=kind, title=words.capitalize(), status=status, detail=detail, request_id=request_id)


def _reasons(error: RequestValidationError) -> str:
    found = error.errors()
    reasons = [f"{' '.join(map(str, e['loc']))[:100]}: {e['msg'][:200]}" for e in found[:_MOST_REASONS]]
    more = [f"and {len(found) - _MOST_REASONS} more"] if len(found) > _MOST_REASONS else []
    return "; ".join(reasons + more)


def _headers(error: Exception) -> dict[str, str]:
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if (seconds := getattr(error, "retry_after_seconds", None)) is not None:
        headers["Retry-After"] = str(max(1, ceil(seconds)))
    if isinstance(error, errors.ShuttingDown):
        headers["Retry-After"] = "1"  # nothing was done, and another instance can take it
    if isinstance(error, errors.OutOfMemory | errors.MemoryExhausted):
        headers.setdefault("Retry-After", str(ceil(RETRY_SECONDS)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnsupportedContentEncoding):
        headers["Accept-Encoding"] = "gzip, deflate, br, zstd"  # RFC 9110, 15.5.16
    if isinstance(error, BodyTooLarge):
        headers["Connection"] = "close"  # the rest of the body will not be read
    return headers


def _response(scope: Scope, body: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    scope["state"]["reason"] = body.type.rpartition(":")[2]  # for the metrics
    if foreign := translated(scope["state"]["path"], body):
        return JSONResponse(foreign[1].model_dump(), foreign[0], headers)
    return JSONResponse(body.model_dump(exclude_none=True), body.status, headers, media_type=MEDIA_TYPE)
