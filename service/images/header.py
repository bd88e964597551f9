"""How many pixels an image has, from a few bytes of its header and in microseconds: enough to queue it by."""

import re
import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from math import prod

from service.errors import InvalidImage
from service.images.limits import tags

_JPEG_SPEED = 4  # a JPEG far larger than the model's input is decoded at reduced size, which takes a quarter
_SMALLEST_LARGE_JPEG = 16_384  # bytes; one of several megapixels has more
_MARKERS = 1000  # of a JPEG before its size; real files have some twenty
LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}  # markers of frames
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}  # of which all coefficients are decoded, whatever the size
_NO_SIZE = {0xC4, 0xC8, 0xCC}  # markers among those of a JPEG's frames that say something else
_TIFF_SIZES, _TIFF_TAGS, _SHORT = {256, 257}, 64, 3  # tags of width and height, among so many; a type
_BOXES_HEAD = 4096  # bytes that the size of an AVIF or HEIF is looked for in


def megapixels(data: bytes) -> float:
    """The megapixels that decoding `data` takes time for; 0 where the header does not say, as in a broken one."""
    with suppress(struct.error, IndexError, InvalidImage):
        return _pixels(data) / 1e6
    return 0.0


def _pixels(data: bytes) -> float:
    for magic, read in _READERS.items():
        if data.startswith(magic):
            return read(data)
    return _box_size(data) if data[4:8] == b"ftyp" else 0


def _product(form: str, data: bytes, start: int) -> int:
    width, height = struct.unpack_from(form, data, start)
    return int(width * height)


def jpeg_frame(data: bytes) -> tuple[int, int]:
    """The marker of a JPEG's first frame, and its pixels; zeros where it has none.

    Segments have their length, up to the one with the size.
    """
    at = 2
    for _ in range(_MARKERS):
        if data[at] != 0xFF:  # noqa: PLR2004  bytes between segments
            at = data.index(b"\xff", at) if b"\xff" in data[at : at + 64] else len(data)
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NO_SIZE:  # noqa: PLR2004  frames
            return marker, _product(">HH", data, at + 5)
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 1:  # noqa: PLR2004  fill bytes, and no segments
            at += 1 if marker == 0xFF else 2  # noqa: PLR2004
            continue
        at += 2 + int(struct.unpack_from(">H", data, at + 2)[0])
    return 0, 0


def _jpeg(data: bytes) -> float:
    if len(data) <= _SMALLEST_LARGE_JPEG:
        return 0
    marker, pixels = jpeg_frame(data)
    return pixels if marker in _PROGRESSIVE else pixels / _JPEG_SPEED


def _webp(data: bytes) -> int:
    kind = data[12:16]
    if kind == b"VP8X":
        sides = struct.unpack("<II", data[24:27] + b"\0" + data[27:30] + b"\0")
        return int((sides[0] + 1) * (sides[1] + 1))
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return int(((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1))
    width, height = struct.unpack_from("<HH", data, 26)
    return int((width & 0x3FFF) * (height & 0x3FFF))


def _bmp(data: bytes) -> int:
    width, height = struct.unpack_from("<ii", data, 18)
    return int(abs(width * height))


def _tiff(data: bytes) -> int:
    order, sizes = "<" if data[:1] == b"I" else ">", {}
    for tag, kind, _, value in islice(tags(data), _TIFF_TAGS):
        if tag in _TIFF_SIZES:
            sizes[tag] = int(struct.unpack_from(order + ("H" if kind == _SHORT else "I"), value)[0])
    return prod(sizes.values()) if len(sizes) == len(_TIFF_SIZES) else 0


def _box_size(data: bytes) -> int:
    """Of AVIF and HEIF: the largest size, for a HEIF may have tiles and a thumbnail."""
    return max(
        (_product(">II", data, found.end() + 4) for found in re.finditer(b"ispe", data[:_BOXES_HEAD])), default=0
    )


_READERS: dict[bytes, Callable[[bytes], float]] = {
    b"\x89PNG": lambda data: _product(">II", data, 16),
    b"\xff\xd8": _jpeg,
    b"RIFF": _webp,
    b"GIF8": lambda data: _product("<HH", data, 6),
    b"BM": _bmp,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
}
