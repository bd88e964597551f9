"""Arrays of pixels as files: PNG for what it holds, TIFF for numbers of 32 bits and signed ones."""

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvt_client.errors import ImageUnreadable

Array = NDArray[Any]

UPRIGHT = 1  # EXIF's and TIFF's number for an image that is not turned
COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # PNG's number for grey, RGB and RGBA
_PLANE, _IMAGE, _BATCH = 2, 3, 4  # axes
_GREY_AND_ALPHA = 2  # channels
_WHITE = {1: 255, 2: 65_535}  # the brightest value of so many bytes
_FAST = 1  # zlib level: each of these images is sent once
_SHORT, _LONG = 3, 4  # TIFF's types
_SAMPLE_FORMATS = {"u": 1, "i": 2, "f": 3}
_DEFLATE, _BLACK_IS_ZERO, _WHITE_IS_ZERO = 8, 1, 0
_HEADER, _ENTRY = 8, 12  # bytes of a TIFF's header and of each of its tags


def encode_png(pixels: Array) -> bytes:
    """Pixels (H, W) or (H, W, 1 | 3 | 4) as a PNG: `uint8` and `uint16` as they are, other kinds in 8 bits.

    Floats are from 0 to 1, and of `bool` True is white.

    Raises:
        ImageUnreadable: another dtype or shape, or floats beyond; the message says what to pass.
    """
    if np.ma.is_masked(pixels):
        raise _refused(pixels, "it has masked values; pass array.filled(value)")
    pixels = np.asarray(pixels)  # a matrix or another subclass, as what it is
    planes = pixels[:, :, None] if pixels.ndim == _PLANE else pixels
    if planes.ndim != _IMAGE or planes.shape[2] not in COLOUR_TYPES or not planes.size:
        raise _refused(pixels, _shape_advice(pixels))
    planes = _whole_numbers(planes)
    height, width, channels = planes.shape
    values = planes.astype(planes.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    rows = np.zeros((height, 1 + values.shape[1]), np.uint8)  # each row begins with its filter's number: 0, none
    rows[:, 1:] = values
    header = struct.pack(">IIBBBBB", width, height, 8 * planes.itemsize, COLOUR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), _FAST)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def encode_tiff(values: Array, *, orientation: int = UPRIGHT, white_is_zero: bool = False) -> bytes:
    """Numbers (H, W) of any integer or float dtype as a grey TIFF (TIFF 6.0, with Deflate), as they are."""
    height, width = values.shape
    data = zlib.compress(values.astype(values.dtype.newbyteorder("<")).tobytes(), _FAST)
    photometric, form = _WHITE_IS_ZERO if white_is_zero else _BLACK_IS_ZERO, _SAMPLE_FORMATS[values.dtype.kind]
    tags = [(256, _LONG, width), (257, _LONG, height), (258, _SHORT, 8 * values.itemsize), (259, _SHORT, _DEFLATE),
            (262, _SHORT, photometric), (273, _LONG, 0), (274, _SHORT, orientation), (277, _SHORT, 1),
            (278, _LONG, height), (279, _LONG, len(data)), (339, _SHORT, form)]  # fmt: skip
    start = _HEADER + 2 + _ENTRY * len(tags) + 4  # of the one strip, behind the tags and the end of their list
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 273 else n) for tag, kind, n in tags)  # noqa: PLR2004
    return struct.pack("<2sHIH", b"II", 42, _HEADER, len(tags)) + entries + bytes(4) + data


def _whole_numbers(pixels: Array) -> Array:
    """`uint8` and `uint16` as they are, booleans as black and white, floats from 0 to 1 in 8 bits."""
    if pixels.dtype.kind == "u" and pixels.itemsize in _WHITE:
        return pixels
    if pixels.dtype.kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind not in "fiu":
        raise _refused(pixels, "convert it to uint8 yourself")
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind != "f":
        raise _refused(pixels, _integer_advice(high) if low >= 0 else "its values are negative", low, high)
    if not np.isfinite([low, high]).all():
        raise _refused(pixels, "it has NaN or infinities; replace them, as by numpy.nan_to_num")
    if low < 0:
        raise _refused(pixels, "floats must be from 0 to 1; undo a normalisation", low, high)
    if high > 1:
        advice = "pass array.round().astype(numpy.uint8)" if high <= _WHITE[1] else "divide by what is white"
        raise _refused(pixels, f"floats must be from 0 to 1; {advice}", low, high)
    scaled: Array = np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    return scaled


def _integer_advice(high: float) -> str:
    fitting = [8 * size for size, white in _WHITE.items() if high <= white]
    choices = " or, if 65535 is white, numpy.uint16" if fitting[:1] == [8] else ""
    return f"pass array.astype(numpy.uint{fitting[0]}){choices}" if fitting else "scale it to uint8 or uint16"


def _shape_advice(pixels: Array) -> str:
    if not pixels.size:
        return "it has no pixels"
    if pixels.dtype.kind in "OUS" and pixels.ndim == 1:
        return "it is a list of images; pass list(array)"
    if pixels.ndim == _BATCH:
        return "pass a batch as list(array), or to predict_many"
    if pixels.ndim == _IMAGE and pixels.shape[0] in COLOUR_TYPES:
        return "where channels come first, pass array.transpose(1, 2, 0)"
    if pixels.ndim == _IMAGE and pixels.shape[2] == _GREY_AND_ALPHA:
        return "of grey with alpha pass a PIL image of mode LA"
    return "pass one array for each image"


def _refused(pixels: Array, advice: str, *span: float) -> ImageUnreadable:
    values = " from {:g} to {:g}".format(*span) if span else ""
    return ImageUnreadable(
        f"an array of {pixels.dtype} {pixels.shape}{values} is not an image: uint8 (H, W) or (H, W, 1 | 3 | 4) is "
        f"expected, or uint16, or floats from 0 to 1; {advice}"
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
