"""Content codings of request bodies (RFC 9110, 8.4): gzip, deflate, br and zstd, decoded piece by piece."""

import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import brotli

from app.problems import UnsupportedContentEncoding
from service.errors import InvalidRequest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 1_000_000  # most that one step decodes
MOST_MEMBERS = 1000  # gzip members or zstd frames; starting one costs more than a byte
MOST_CODINGS = 4  # on top of each other
_FEED_BYTES = 65_536
_ZLIB_HEADER_BYTES = 2
_ZSTD_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): 23}  # 8 MB, the most that RFC 9659 lets a sender use


def codings(values: list[str]) -> list[str]:
    """The codings that the `Content-Encoding` headers name, in the order in which they were applied.

    Raises:
        UnsupportedContentEncoding: one of them is not read here, or there are more than MOST_CODINGS.
    """
    names = [name for value in values for part in value.split(",") if (name := part.strip().lower())]
    names = [name.removeprefix("x-") if name == "x-gzip" else name for name in names if name != "identity"]
    for name in names:
        if name not in _DECODERS:
            raise UnsupportedContentEncoding(
                f"content encoding {name[:100]!r}; send {', '.join(_DECODERS)}, or the body as it is"
            )
    if len(names) > MOST_CODINGS:
        raise UnsupportedContentEncoding(
            f"{len(names)} content encodings on top of each other; send at most {MOST_CODINGS}"
        )
    return names


def decoded(coding: str, body: bytes) -> Iterator[bytes]:
    """The content of `body`, in pieces of at most PIECE_BYTES, each decoded when it is asked for.

    Raises:
        InvalidRequest: it is not in that coding, ends too early, or something follows it.
    """
    try:
        yield from _DECODERS[coding](body)
    except (zlib.error, brotli.error, zstd.ZstdError) as error:
        raise InvalidRequest(f"the body is no {coding}, which its Content-Encoding names: {error}") from error


def _cut_off(coding: str) -> InvalidRequest:
    return InvalidRequest(f"the body ends in the middle of its {coding}")


def _gzip(body: bytes) -> Iterator[bytes]:
    """One member after another, as `cat a.gz b.gz` makes them (RFC 1952, 2.2)."""
    return _members("gzip", body, lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), MOST_MEMBERS)


def _deflate(body: bytes) -> Iterator[bytes]:
    """With zlib's header as RFC 9110 demands, or without, as some senders do."""
    head = body[:_ZLIB_HEADER_BYTES]
    wrapped = len(head) == _ZLIB_HEADER_BYTES and head[0] & 0xF == zlib.DEFLATED and not int.from_bytes(head) % 31
    return _members("deflate", body, lambda: zlib.decompressobj(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS), 1)


def _zstd(body: bytes) -> Iterator[bytes]:
    """One frame after another (RFC 8878, 3.1)."""
    return _members("zstd", body, lambda: zstd.ZstdDecompressor(options=_ZSTD_OPTIONS), MOST_MEMBERS)


def _members(coding: str, body: bytes, make: Callable[[], Any], most: int) -> Iterator[bytes]:
    """Up to `most` streams, each decoded by what `make` makes. In slices: what a stream leaves over, it copies."""
    stream, count = make(), 1
    for start in range(0, len(body), _FEED_BYTES):
        rest = body[start : start + _FEED_BYTES]
        more = True
        while more:
            if stream.eof:
                if coding == "gzip" and not (rest := rest.lstrip(b"\0")):  # which tapes pad with
                    break
                if count == most:
                    raise InvalidRequest(f"something follows the body's {coding}, of which it may have {most}")
                stream, count = make(), count + 1
            piece = stream.decompress(rest, PIECE_BYTES)
            yield piece
            rest = stream.unused_data if stream.eof else getattr(stream, "unconsumed_tail", b"")
            more = bool(rest) or (not stream.eof and len(piece) == PIECE_BYTES)
    if not stream.eof:
        raise _cut_off(coding)


def _brotli(body: bytes) -> Iterator[bytes]:
    stream = brotli.Decompressor()
    for start in range(0, len(body), _FEED_BYTES):
        if stream.is_finished():
            raise InvalidRequest("something follows the body's br")
        yield stream.process(body[start : start + _FEED_BYTES], output_buffer_limit=PIECE_BYTES)
        while not stream.can_accept_more_data():
            yield stream.process(b"", output_buffer_limit=PIECE_BYTES)
    if not stream.is_finished():
        raise _cut_off("br")


_DECODERS: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}
