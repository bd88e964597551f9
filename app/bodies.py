"""Request bodies: to image bytes from multipart, raw bytes or JSON with base64; and JSON within bounds."""

import asyncio
import base64
import binascii
import re
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

import orjson
from fastapi import Request
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.compression import codings, decoded
from app.problems import BodyTooLarge, UnsupportedMediaType
from app.settings import Settings
from service.errors import InvalidImage, InvalidRequest, ServiceError
from service.memory import SMALL_BYTES, Reservation

FIELD = "image"  # of a form
RAW_TYPES = re.compile(r"image/[\w.+-]+|application/octet-stream")
# One white pixel as a PNG.
EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
DISCARD_SECONDS = 5.0
JSON_COPIES = 2  # of a body's bytes, while it is parsed: its text, and what base64 in it is decoded to
LARGE_JSON = 65_536  # bytes; parsing more would hold up the event loop
# The JSON parser holds the interpreter's lock, and with it the event loop, even on a thread: 40 ns for each number. No
# request needs so many values; the tensors of `/v2` are parsed apart, in chunks.
MAX_COMMAS = 20_000


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
    """Each image as base64, as a `data:` URL with base64, or as an object with a URL."""


BODY_EXAMPLES = {
    "base64": {"images": [EXAMPLE]},
    "data URL": {"images": [f"data:image/png;base64,{EXAMPLE}"]},
    "several images": {"images": [EXAMPLE, EXAMPLE]},
    "URL": {"images": [{"url": "https://example.org/cat.jpg"}]},
}


async def read_uploads(request: Request, held: Reservation) -> list[Upload | Link]:
    """The images of a request, in their order; in JSON some may be links. `held` grows by the memory that they take.

    Raises:
        UnsupportedMediaType, BodyTooLarge: the body has none of the three forms, or more than PVT_MAX_BODY_MB.
        MemoryExhausted: it does not fit into memory beside the bodies of other requests.
        InvalidRequest: the body is not what its content type says, or holds no image or more than PVT_MAX_IMAGES.
    """
    settings: Settings = request.state.settings
    max_bytes, most = settings.max_body_bytes, settings.max_images
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    if content_type == "multipart/form-data":
        return _multipart(await read_body(request, max_bytes, held), options.get("boundary", ""), most)
    if RAW_TYPES.fullmatch(content_type):
        return [Upload(None, await read_body(request, max_bytes, held))]
    if content_type == "application/json":
        body = await read_body(request, max_bytes, held)
        held.grow(JSON_COPIES * len(body))
        return _json(body, most) if len(body) < LARGE_JSON else await run_in_threadpool(_json, body, most)
    raise UnsupportedMediaType(
        f"content type {content_type or '(none)'!r}; send multipart/form-data with a file field {FIELD!r}, the "
        "image's bytes as image/* or application/octet-stream, or application/json"
    )


async def read_body(request: Request, max_bytes: int, held: Reservation) -> bytes:
    """The body without its content codings, which counts as the body itself does.

    Raises:
        UnsupportedContentEncoding, BodyTooLarge: see `app.compression`; the body or its content exceeds `max_bytes`.
        MemoryExhausted: it does not fit into memory.
        InvalidRequest: it is not in the coding that its headers name.
    """
    if "content-encoding" not in request.headers:
        return await _read_encoded(request, max_bytes, held)
    names = codings(request.headers.getlist("content-encoding"))
    body = await _read_encoded(request, max_bytes, held)
    for name in reversed(names) if body else ():
        body = await _decode(name, body, max_bytes, held)
    return body


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
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
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
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "enough memory" in str(error):  # orjson's words for it
            raise MemoryError from error
        raise InvalidRequest(f"the body is no JSON: {error}") from error


def from_base64(text: str) -> bytes | InvalidImage:
    """The bytes of base64, or of a data: URL with it; or what is wrong with it."""
    match = DATA_URL.match(text)
    try:
        return base64.b64decode(text[match.end() :] if match else text, validate=True)
    except (binascii.Error, ValueError) as error:
        return InvalidImage(f'not valid base64, nor a data: URL of it: {error}; an image\'s URL goes in {{"url": ...}}')


def check_count(count: int, max_images: int) -> None:
    """Raises InvalidRequest when a request has none or more than `max_images` images."""
    if not count:
        raise InvalidRequest("the request carries no image")
    if count > max_images:
        raise InvalidRequest(f"more than {max_images} images in one request, which PVT_MAX_IMAGES allows")


def _multipart(body: bytes, boundary: str, max_images: int) -> list[Upload | Link]:
    """Parsed at once: each part is cut out of the body whole, and that is its only copy."""
    uploads: list[Upload | Link] = []
    filename, data = None, b""
    try:
        with PushMultipartParser(boundary) as parser:
            for event in parser.parse(body):
                if isinstance(event, MultipartSegment):
                    filename, data = event.filename, b""
                    if (name := event.name or "") != FIELD:
                        raise InvalidRequest(
                            f"unknown form field {name[:100]!r}; files go in {FIELD!r}, parameters in the query"
                        )
                    check_count(len(uploads) + 1, max_images)
                elif event is not None:
                    data += event  # the first chunk, and there is no other, is not copied
                else:
                    uploads.append(Upload(filename, data))
    except MultipartError as error:
        raise InvalidRequest(f"the multipart body is broken: {error.args[0]}") from error
    if not uploads:
        raise InvalidRequest(f"the form has no file; send at least one in the field {FIELD!r}")
    return uploads


def _json(body: bytes, max_images: int) -> list[Upload | Link]:
    """By hand, and up to the first mistake: a validator would list a million wrong items."""
    match parse_json(body):
        case {"images": list(images), **others}:
            if others:
                raise InvalidRequest(f"unknown field {str(next(iter(others)))[:100]!r}; parameters go in the query")
        case _:
            raise InvalidRequest(
                'the body must be an object with a list of images: {"images": ["<base64>", {"url": "..."}, ...]}'
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
