"""Request bodies: to image bytes from multipart, raw bytes or JSON with base64; and JSON within bounds."""

import asyncio
import re
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Annotated, Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from urllib.parse import urlsplit

import orjson
from fastapi import Request
from multipart import parse_options_header
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.compression import codings, decoded
from app.data_urls import from_base64
from app.forms import is_form, parts, uncoded
from app.problems import BodyTooLarge, Forbidden, TooManyImages, UnsupportedMediaType
from app.settings import Settings
from service.errors import InvalidImage, InvalidRequest, ServiceError
from service.images.kinds import is_known
from service.memory import SMALL_BYTES, Reservation
from service.names import meant

FORM, JSON, RAW = "multipart/form-data", "application/json", "image/*"
FIELD = "image"  # of a form
RAW_TYPES = re.compile(r"image/[\w.+-]+|application/(octet-stream|x-image)")
_NO_IMAGE = b"-{[ \t\r\n\xef"  # how no image begins, but a form may, or JSON
_JSON_BEGINS = re.compile(rb"(?:\xef\xbb\xbf)?\s*[{\[]")
_INDENTED = 4096  # bytes that may stand before the first bracket of JSON
_SIMPLE_TYPES = {FORM, "application/x-www-form-urlencoded", "text/plain", ""}  # what pages send without a preflight
_PREFLIGHTED = {"authorization", "prefer", "x-request-id"}  # only after one
_SHOWN = 100  # characters of what a client has sent
# One white pixel as a PNG.
EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
DISCARD_SECONDS = 5.0
JSON_COPIES = 2  # of a body's bytes, while it is parsed: its text, and what base64 in it is decoded to
LARGE_JSON = 65_536  # bytes; parsing more would hold up the event loop
# The JSON parser holds the interpreter's lock, and with it the event loop, even on a thread: 40 ns for each number. No
# request needs so many values; the tensors of `/v2` are parsed apart, in chunks.
MAX_COMMAS = 20_000

T = TypeVar("T")
P = ParamSpec("P")


class Upload(NamedTuple):
    """One encoded image, or why it can't be read, and the name its sender gave it."""

    filename: str | None
    data: bytes | ServiceError


class Link(NamedTuple):
    """An image by its URL; `app.remote_images` fetches it."""

    url: str


class ImageUrl(BaseModel):
    """An image by its URL."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: Annotated[str, Field(max_length=65_536)]
    """`http` or `https`, on one of PVT_URL_HOSTS; refused where that is empty, as it is by default."""


class ImagesBody(BaseModel):
    """The JSON form, for the schema."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    images: Annotated[list[str | ImageUrl], Field(min_length=1)]
    """Each image as base64, as a `data:` URL, or as an object with a URL."""


BODY_EXAMPLES = {
    "base64": {"images": [EXAMPLE]},
    "data URL": {"images": [f"data:image/png;base64,{EXAMPLE}"]},
    "several images": {"images": [EXAMPLE, EXAMPLE]},
    "URL": {"images": [{"url": "https://example.org/cat.jpg"}]},
}


def timed(read: Callable[Concatenate[Request, P], Awaitable[T]]) -> Callable[Concatenate[Request, P], Awaitable[T]]:
    """`read`, with its beginning and end, on `perf_counter`, left in the request's state, also where it fails."""

    async def run(request: Request, /, *args: P.args, **kwargs: P.kwargs) -> T:
        start = perf_counter()
        try:
            return await read(request, *args, **kwargs)
        finally:
            request.state.read = start, perf_counter()

    return run


@timed
async def read_uploads(
    request: Request, held: Reservation, parse: Callable[..., list[Upload | Link]] | None = None
) -> list[Upload | Link]:
    """The images of a request, in their order; in JSON some may be links. `held` grows by the memory that they take.

    `parse` reads JSON of other forms, the body with up to `max_images`.

    Raises:
        UnsupportedMediaType, BodyTooLarge: the body has none of the three forms, or more than PVT_MAX_BODY_MB.
        MemoryExhausted: it does not fit into memory beside the bodies of other requests.
        InvalidRequest: the body is broken, or holds no image or more than PVT_MAX_IMAGES.
    """
    settings: Settings = request.state.settings
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    body = await read_body(request, settings.max_body_bytes, held)
    form = _form(content_type, body)
    if form == FORM:
        return await _multipart(body, options.get("boundary", ""), settings.max_images, held)
    if form == JSON:
        return await _parsed(body, held, partial(parse or _json, max_images=settings.max_images))
    return [Upload(None, body)]


def _form(content_type: str, body: bytes) -> str:
    """Which of the three forms `body` has: the one that it begins as, else the one that its content type names.

    curl names a form's where it sends a file's bytes, and browsers text/plain (decision 81).

    Raises:
        InvalidRequest, UnsupportedMediaType: there is no body, or neither says it.
    """
    raw = RAW_TYPES.fullmatch(content_type)
    if raw and body[:1] not in _NO_IMAGE:
        return RAW
    if is_form(body):
        return FORM
    if _JSON_BEGINS.match(body, 0, _INDENTED):
        return JSON
    if raw or is_known(body):
        return RAW
    if content_type in {FORM, JSON}:
        return content_type
    send = (
        f"send {FORM} with a file field {FIELD!r} (curl -F {FIELD}=@FILE), an image's bytes (curl --data-binary @FILE) "
        f"or {JSON}"
    )
    if not body:
        raise InvalidRequest(f"the request carries no image; {send}")
    raise UnsupportedMediaType(
        f"the body begins as no image, form or JSON, and its content type is {content_type[:_SHOWN] or '(none)'!r}; "
        + send
    )


async def read_body(request: Request, max_bytes: int, held: Reservation) -> bytes:
    """The body without its content codings, which counts as the body itself does.

    Raises:
        UnsupportedContentEncoding, BodyTooLarge: see `app.compression`; the body or its content exceeds `max_bytes`.
        MemoryExhausted: it does not fit into memory.
        InvalidRequest: it is not in the coding that its headers name.
        Forbidden: a web page of another site sent it.
    """
    sent = dict(request.scope["headers"])  # one pass over them, where looking each up takes one
    if b"origin" in sent:
        _refuse_other_sites(request)
    if b"content-encoding" not in sent:
        return await _read_encoded(request, max_bytes, held)
    names = codings(request.headers.getlist("content-encoding"))
    body = await _read_encoded(request, max_bytes, held)
    for name in reversed(names) if body else ():
        body = await _decode(name, body, max_bytes, held)
    return body


def _refuse_other_sites(request: Request) -> None:
    """Keep pages of other sites from using their reader's browser; no other client sends `Origin` by itself.

    Raises:
        Forbidden: the request is one that a browser sends without a preflight (Fetch standard, "CORS-safelisted"), and
            comes from an origin that is neither this one nor one of PVT_CORS_ORIGINS.
    """
    headers, settings = request.headers, request.state.settings
    origin, host = headers["origin"], request.scope["state"].get("host") or headers.get("host", "")
    content_type = parse_options_header(headers.get("content-type", ""))[0]
    if (
        content_type not in _SIMPLE_TYPES
        or not _PREFLIGHTED.isdisjoint(headers)
        or headers.get("sec-fetch-site") in {"same-origin", "none"}
        or urlsplit(origin).netloc == host
        or not {origin, "*"}.isdisjoint(settings.cors_origins)
    ):
        return
    raise Forbidden(
        f"a page of {origin[:_SHOWN]!r} may send nothing to {host[:_SHOWN]!r} unless PVT_CORS_ORIGINS names it; "
        "a proxy that replaces Host is to be in PVT_TRUSTED_PROXIES"
    )


@timed
async def read_json(request: Request, held: Reservation, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of the body, on a thread if that is large; raises as `read_body` and `parse`."""
    return await _parsed(await read_body(request, request.state.settings.max_body_bytes, held), held, parse)


async def _parsed(body: bytes, held: Reservation, parse: Callable[[bytes], T]) -> T:
    held.grow(JSON_COPIES * len(body))
    return parse(body) if len(body) < LARGE_JSON else await run_in_threadpool(parse, body)


async def _decode(coding: str, body: bytes, max_bytes: int, held: Reservation) -> bytes:
    """On a thread, step by step, so that what expands without end is refused at the limit. Frees `body` in `held`."""
    content, pieces = bytearray(), decoded(coding, body)
    while (piece := await run_in_threadpool(next, pieces, None)) is not None:
        _count(piece, len(content), max_bytes, held)
        content += piece
    held.shrink(len(body))
    return bytes(content)


async def _read_encoded(request: Request, max_bytes: int, held: Reservation) -> bytes:
    """The body as it was sent; refuses one that announces, or turns out, to be larger than `max_bytes`.

    `held` grows as it arrives, not by what is announced: who sends nothing takes no memory from others. A body that is
    refused for want of memory is not waited for: the connection goes on, and what still comes of it is dropped.
    """
    announced = dict(request.scope["headers"]).get(b"content-length", b"")
    if announced.isdigit():
        if int(announced) > max_bytes:
            if "expect" not in request.headers:  # a client that expects 100-continue has not sent anything yet
                await _discard(request)
            raise _too_large(max_bytes)
        if int(announced) > SMALL_BYTES:
            held.check(int(announced))
    body, more = await _receive(request)
    if not more:
        _count(body, 0, max_bytes, held)
        return body
    chunk, buffer = body, bytearray()  # one block, which goes back to the system whole; chunks would leave holes
    while True:
        try:
            _count(chunk, len(buffer), max_bytes, held)
        except BodyTooLarge:
            if more:
                await _discard(request)
            raise
        buffer += chunk
        if not more:
            return bytes(buffer)
        chunk, more = await _receive(request)


def _count(chunk: bytes, before: int, max_bytes: int, held: Reservation) -> None:
    """Reserve memory for `chunk`, which comes after so many bytes; raises as `read_body`."""
    if before + len(chunk) > max_bytes:
        raise _too_large(max_bytes)
    held.grow(len(chunk))


async def _receive(request: Request) -> tuple[bytes, bool]:
    """The next chunk of the body, and whether there are more; Starlette's stream takes twice as long."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


async def _discard(request: Request) -> None:
    """Let a client finish what it is sending, for a while: closing the connection would destroy the response."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await _receive(request))[1]:
                pass


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {max_bytes / 1e6:g} MB, which PVT_MAX_BODY_MB allows")


def parse_json(body: bytes) -> Any:  # noqa: ANN401  whatever JSON holds
    """The value that `body` holds.

    Raises:
        InvalidRequest: it is no JSON, or holds so many values that parsing it would hold up all other requests.
    """
    if len(body) > MAX_COMMAS and (commas := body.count(b",")) > MAX_COMMAS:
        raise InvalidRequest(f"the body's JSON holds {commas} commas, so many values; {MAX_COMMAS} are allowed")
    try:
        return orjson.loads(body.removeprefix(BOM_UTF8))
    except orjson.JSONDecodeError as error:
        if "enough memory" in str(error):  # orjson's words for it
            raise MemoryError from error
        raise InvalidRequest(_no_json(body, str(error))) from error


def _no_json(body: bytes, reason: str) -> str:
    is_file = not _JSON_BEGINS.match(body, 0, _INDENTED) and is_known(body)
    what = "the body is a form" if is_form(body) else "the body is a file's bytes" if is_file else ""
    if what or not body.strip():
        way = "files go to /predict, /features and /explain, or into the JSON as base64"
        return f"{what or 'the request has no body'}, and this endpoint reads JSON; {way}"
    encoding = "; JSON is UTF-8, and this looks like UTF-16" if b"\0" in body[:4] else ""
    return f"the body is no JSON: {reason}{encoding}"


def check_count(count: int, max_images: int) -> None:
    """Raises InvalidRequest when a request has no image, TooManyImages when it has more than `max_images`."""
    if not count:
        raise InvalidRequest("the request carries no image")
    if count > max_images:
        raise TooManyImages(f"more than {max_images} images in one request, which PVT_MAX_IMAGES allows")


async def _multipart(body: bytes, boundary: str, max_images: int, held: Reservation) -> list[Upload | Link]:
    uploads: list[Upload | Link] = []
    for name, filename, data, coding in parts(body, boundary):
        if name != FIELD:
            way = f"files go in {FIELD!r}: curl -F {FIELD}=@FILE"
            if filename is None:
                way += f"; parameters go in the query: ?{name[:_SHOWN]}=..."
            raise InvalidRequest(f"unknown form field {name[:_SHOWN]!r}; {way}")
        check_count(len(uploads) + 1, max_images)
        image: bytes | InvalidImage = data
        if coding:
            held.grow(len(data))
            image = await run_in_threadpool(uncoded, data, coding)
        uploads.append(Upload(filename, image if filename is not None else _without_name(image)))
    if not uploads:
        raise InvalidRequest(f"the form has no file; send at least one in the field {FIELD!r}: curl -F {FIELD}=@FILE")
    return uploads


def _without_name(data: bytes | InvalidImage) -> bytes | InvalidImage:
    """The data of a part without a file name, which may be no file."""
    if not isinstance(data, bytes) or not data or b"\0" in data or is_known(data):
        return data
    return InvalidImage(
        f"text, not a file: {data[:_SHOWN].decode(errors='replace')!r}; with curl put an @ before the file's name: "
        f"-F {FIELD}=@FILE"
    )


def _json(body: bytes, max_images: int) -> list[Upload | Link]:
    return images_of(parse_json(body), max_images)


def images_of(value: object, max_images: int) -> list[Upload | Link]:
    """Those of the JSON form; by hand, and up to the first mistake: a validator would list a million wrong items."""
    match value:
        case {"images": list(images), **others}:
            if others:
                raise InvalidRequest(f"unknown field {str(next(iter(others)))[:_SHOWN]!r}; parameters go in the query")
        case other:
            name = next((str(each) for each in other if each != "images"), "") if isinstance(other, dict) else ""
            wrong = f"unknown field {name[:_SHOWN]!r}{meant(name, ['images']) or ';'} " if name else ""
            raise InvalidRequest(
                wrong
                + 'the body must be an object with a list of images: {"images": ["<base64>", {"url": "..."}, ...]}'
            )
    check_count(len(images), max_images)
    uploads: list[Upload | Link] = []
    for index, image in enumerate(images):
        match image:
            case str():
                uploads.append(Upload(None, from_base64(image)))
            case {"url": str(url), **others} if not others:
                uploads.append(Link(url))
            case _:
                raise InvalidRequest(
                    f'images.{index} is no image; send a string, base64 or a data: URL, or {{"url": "https://..."}}'
                )
    return uploads
