"""Request bodies to image bytes: multipart, raw, or JSON with base64."""

import base64
import binascii
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import Request
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.problems import BodyTooLarge, UnsupportedMediaType
from service.errors import InvalidImage, InvalidRequest

FIELD = "image"
RAW_TYPES = re.compile(r"image/[\w.+-]+|application/octet-stream")
DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
LARGE_JSON = 65_536  # bytes; parsing more would hold up the event loop


@dataclass(frozen=True, slots=True)
class Upload:
    """One encoded picture, or why it can't be read, and the name its sender gave it."""

    filename: str | None
    data: bytes | InvalidImage


class ImagesBody(BaseModel):
    """The JSON form."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: Annotated[list[str], Field(description="Each picture as base64 or as a `data:` URL with base64.")]


async def read_uploads(request: Request, max_bytes: int) -> list[Upload]:
    """The pictures of a request, in their order.

    Raises:
        UnsupportedMediaType: the content type is none of the three forms.
        BodyTooLarge: more than `max_bytes`.
        InvalidRequest: the body is not what its content type says; the message names the field.
    """
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    chunks = _limited(request, max_bytes)
    if content_type == "multipart/form-data":
        return await _multipart(chunks, options.get("boundary", ""))
    if RAW_TYPES.fullmatch(content_type):
        return [Upload(None, b"".join([chunk async for chunk in chunks]))]
    if content_type == "application/json":
        body = b"".join([chunk async for chunk in chunks])
        return _json(body) if len(body) < LARGE_JSON else await run_in_threadpool(_json, body)
    raise UnsupportedMediaType(
        f"content type {content_type or '(none)'!r}; send multipart/form-data with a file field {FIELD!r}, the "
        "picture's bytes as image/* or application/octet-stream, or application/json"
    )


async def _limited(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The body's chunks; refuses what announces, or turns out, to be more than `max_bytes`."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {max_bytes / 1e6:g} MB, which PVT_MAX_BODY_MB allows")


async def _multipart(chunks: AsyncIterator[bytes], boundary: str) -> list[Upload]:
    uploads: list[Upload] = []
    parts: list[bytes | bytearray] = []
    segment: MultipartSegment | None = None
    try:
        with PushMultipartParser(boundary) as parser:
            async for chunk in chunks:
                for event in parser.parse(chunk):
                    if isinstance(event, MultipartSegment):
                        segment = _image_field(event)
                    elif event is not None:
                        parts.append(event)
                    elif segment is not None:
                        uploads.append(Upload(segment.filename, b"".join(parts)))
                        parts.clear()
    except ClientDisconnect:
        raise
    except MultipartError as error:
        raise InvalidRequest(f"the multipart body is broken: {error}") from error
    if not uploads:
        raise InvalidRequest(f"the form has no file; send at least one in the field {FIELD!r}")
    return uploads


def _image_field(segment: MultipartSegment) -> MultipartSegment:
    if segment.name != FIELD:
        raise InvalidRequest(f"unknown form field {segment.name!r}; files go in {FIELD!r}, parameters in the query")
    return segment


def _json(body: bytes) -> list[Upload]:
    try:
        images = ImagesBody.model_validate_json(body).images
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors(include_url=False)
        )
        raise InvalidRequest(reasons) from error
    return [Upload(None, _base64(text)) for text in images]


def _base64(text: str) -> bytes | InvalidImage:
    match = DATA_URL.match(text)
    try:
        return base64.b64decode(text[match.end() :] if match else text, validate=True)
    except (binascii.Error, ValueError) as error:
        return InvalidImage(f"neither base64 nor a data: URL with base64: {error}")
