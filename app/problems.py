"""Where HTTP meets errors: their status, their one body (RFC 9457), their one handler."""

import re
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from math import ceil
from typing import Annotated, Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app import http_errors
from app.dialects import translated
from service import errors

log = structlog.get_logger(component="http")

_TOLD = 5  # of what is wrong with one request
MEDIA_TYPE = "application/problem+json"
CLIENT_CLOSED_REQUEST = 499  # nginx's number for a caller that hung up


class UnsupportedMediaType(errors.ServiceError):
    """The body's content type is none that the endpoint reads."""


class NotAcceptable(errors.ServiceError):
    """The endpoint answers in no form that the caller accepts."""


class BodyTooLarge(errors.ImageTooLarge):
    """The request body exceeds PVT_MAX_BODY_MB."""


class ImageUrlRefused(errors.InvalidRequest):
    """A picture's URL is one that this service does not fetch; the message says why."""


class ImageUnreachable(errors.ServiceError):
    """A picture's URL was asked for and gave no picture; the message says how far that got."""


class ImageTimedOut(ImageUnreachable):
    """A picture's URL did not give it within PVT_URL_TIMEOUT_MS."""


class Unauthorized(errors.ServiceError):
    """The request carries no valid key."""


class Forbidden(errors.ServiceError):
    """The service is set not to do this for anyone; the message names the setting."""


# The nearest class in an error's ancestry decides.
STATUS: Mapping[type[Exception], int] = {
    errors.InvalidRequest: 422,
    errors.ImageTooLarge: 413,
    errors.ModelNotFound: 404,
    errors.WeightsUnavailable: 503,
    errors.AliasesInvalid: 503,
    errors.StoreNotWritable: 503,
    errors.ModelLoadFailed: 503,
    errors.ModelLoading: 503,
    errors.MemoryBudgetExceeded: 503,
    errors.ModelPinned: 409,
    errors.OutOfMemory: 503,
    errors.DeviceFailed: 503,
    errors.QueueFull: 429,
    errors.DeadlineExceeded: 504,
    errors.ShuttingDown: 503,
    UnsupportedMediaType: 415,
    ImageUnreachable: 502,
    ImageTimedOut: 504,
    NotAcceptable: 406,
    Unauthorized: 401,
    Forbidden: 403,
    http_errors.MalformedRequest: 400,
    http_errors.HeadTooLarge: 431,
    http_errors.UnsupportedRequest: 501,
    http_errors.UnsupportedVersion: 505,
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
    403: "Management is off, or not for this port (PVT_MANAGEMENT_KEYS, PVT_MANAGEMENT_PORT).",
    404: "No such model.",
    406: "No form of answer that `Accept` takes.",
    409: "The model is pinned in memory.",
    413: "The body or a picture exceeds a limit.",
    415: "Unsupported form of body.",
    422: "A parameter or a picture is wrong.",
    429: "The model's queue is full; `Retry-After` says when to come back.",
    500: "Unexpected; the log has it under the request id.",
    502: "A picture's URL gave no picture.",
    503: "The model is unavailable, or the service is shutting down; `Retry-After` says when it may be there.",
    504: "Not answered within `timeout_ms`, or a picture not fetched within PVT_URL_TIMEOUT_MS.",
}

_SAMPLE_ID = "e0a4aa4ff30f41ab9122180526e30d37"
# Details as they are told, for the examples of the OpenAPI document; of the others the class says what they are.
_SAMPLES: Mapping[type[Exception], str] = {
    errors.InvalidRequest: "query top_k: must be from 1 to 1000",
    errors.InvalidImage: "not a supported image (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF)",
    errors.DeadlineExceeded: "no answer within 100 ms; allow more with timeout_ms or PVT_TIMEOUT_MS",
    errors.ShuttingDown: "the service is shutting down and takes no new work; send the request again",
    ImageUrlRefused: "images by URL are off; PVT_URL_HOSTS is to name the hosts that they may come from",
    ImageUnreachable: "the URL's host example.org answered 404",
    ImageTimedOut: "the URL's host example.org did not give the picture within the 10 s of PVT_URL_TIMEOUT_MS",
    BodyTooLarge: "the request body is larger than 32 MB, which PVT_MAX_BODY_MB allows",
    Forbidden: "management is off; set PVT_MANAGEMENT_KEYS to one or more keys to turn it on",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these problems."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": MEANING[status], "content": content} for status in statuses}


def examples(status: int) -> dict[str, dict[str, Any]]:
    """An example of every problem that has this status, for the OpenAPI document; named by the problem's type."""
    told = [(problem(kind.__new__(kind, _SAMPLES.get(kind, _said(kind))), _SAMPLE_ID), kind) for kind in _kinds()]
    if status == problem(Exception()).status:
        told = [(problem(Exception(), _SAMPLE_ID), Exception)]
    return {
        each.type.rpartition(":")[2]: {"summary": _said(kind), "value": each.model_dump()}
        for each, kind in sorted(told, key=lambda pair: pair[0].type)
        if each.status == status
    }


def _kinds(kind: type[Exception] = errors.ServiceError) -> list[type[Exception]]:
    """Every kind of error that has a status of its own or of an ancestor."""
    below = [each for child in kind.__subclasses__() for each in _kinds(child)]
    return below if kind is errors.ServiceError else [kind, *below]


def _said(kind: type[Exception]) -> str:
    if kind is Exception:
        return MEANING[500]
    return (kind.__doc__ or kind.__name__).partition("\n")[0]


def problem(error: Exception, request_id: str | None = None) -> Problem:
    """What a caller is told of `error`: all of one of ours, nothing of any other."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return _problem(type(error).__name__, STATUS[kind], str(error), request_id)
    return _problem("InternalError", 500, "an unexpected error; the log has it under this request id", request_id)


def install(app: FastAPI) -> None:
    """Make every foreseen error that leaves a route, and every refusal of the framework, a problem."""
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)


async def respond(request: Request, error: Exception) -> Response:
    """The response to one of the FORESEEN errors."""
    return await next(handler for kind, handler in _HANDLERS.items() if isinstance(error, kind))(request, error)


def _problem(name: str, status: int, detail: str, request_id: str | None) -> Problem:
    words = re.sub(r"(?<!^)(?=[A-Z])", " ", name)
    kind = f"urn:pvt-serve:problem:{words.replace(' ', '-').lower()}"
    return Problem(type=kind, title=words.capitalize(), status=status, detail=detail, request_id=request_id)


def _response(path: str, body: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    if foreign := translated(path, body.status, body.type, body.detail):
        return JSONResponse(foreign.body, foreign.status, headers)
    return JSONResponse(body.model_dump(exclude_none=True), body.status, headers, media_type=MEDIA_TYPE)


def _request_id(request: Request) -> str | None:
    return getattr(request.state, "request_id", None)


def _told(request: Request, body: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response, and a note of it for the request's log line."""
    request.state.log = {"problem": body.title, "detail": body.detail}
    return _response(request.url.path, body, headers)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    headers = {}
    if (seconds := getattr(error, "retry_after_seconds", None)) is not None:
        headers["Retry-After"] = str(max(1, ceil(seconds)))
    if isinstance(error, errors.ShuttingDown):
        headers["Retry-After"] = "1"  # nothing was done, and whoever comes next takes it
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge):
        headers["Connection"] = "close"  # the rest of the body will not be read
    return _told(request, problem(error, _request_id(request)), headers)


async def _invalid_parameters(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101  it is registered for nothing else
    found = error.errors()
    reasons = "; ".join(f"{' '.join(map(str, e['loc']))[:100]}: {e['msg'][:200]}" for e in found[:_TOLD])
    if len(found) > _TOLD:
        reasons += f"; and {len(found) - _TOLD} more"
    return _told(request, _problem("InvalidRequest", 422, reasons, _request_id(request)))


async def _framework_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101  it is registered for nothing else
    name = HTTPStatus(error.status_code).phrase.title().replace(" ", "").replace("-", "")
    detail = f"{request.method} {request.url.path}: {error.detail}; GET /docs lists what there is"
    return _told(request, _problem(name, error.status_code, detail, _request_id(request)), error.headers)


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it; the log and the metrics do


_HANDLERS: Mapping[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    errors.ServiceError: _service_error,
    RequestValidationError: _invalid_parameters,
    HTTPException: _framework_refusal,
    ClientDisconnect: _client_gone,
}
FORESEEN = tuple(_HANDLERS)


def unexpected(error: Exception, request_id: str, path: str) -> Response:
    """The answer to an error that nobody foresaw: the log learns everything, the caller nothing."""
    log.error("unexpected_error", request_id=request_id, exc_info=error)
    return _response(path, problem(error, request_id))
