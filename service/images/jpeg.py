"""The pixels of a JPEG: all of them or an error.

libjpeg fills missing pixels with grey and only warns, and Pillow drops its warnings. simplejpeg, with the same library,
reports them. A JPEG without an end marker is whole if nothing else is missing, so every file gets one.
"""

import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from service.errors import InvalidImage
from service.images.limits import BoundedReader, more_than

_END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan FF 00 is data, and FF D0 to FF D7 restart it
_MOST_SEGMENTS = 20_000
_BARE = {0x01, 0xD8, *range(0xD0, 0xD8)}  # markers without a segment
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE, _ARITHMETIC = {0xC2, 0xCA}, range(0xC9, 0xD0)
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_MAX_SCANNED_PIXELS = 2_000_000_000  # passes over the pixels of a JPEG, 0.3 s per billion; real ones make 10
_HALVED_PIXELS = 2**24  # above, a JPEG of several scans is read at half its sides: libjpeg keeps 8 bytes per pixel
# Words of libjpeg's warnings; its other warnings are about bytes that no pixel needs, or about the header.
_MISSING = ("premature end", "Premature end")
_DAMAGED = ("bad Huffman code", "instead of RST")
_SMALL_PIXELS = 2**21  # up to here the resampling wants three bytes per pixel, above it would be a copy too many
# Read in place of an end marker: libjpeg looks 8 bytes ahead, and of these 17 bits make no more than one value.
_LOOKED_AT = b"\xff\x00" * 8


class _Pixels(Image.Image):
    """An RGB image that is an array; Pillow's own copy, with four bytes a pixel, is made only when Pillow needs it."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        super().__init__()
        self._mode, self._size, self._pixels = "RGB", (pixels.shape[1], pixels.shape[0]), pixels

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._pixels.__array_interface__

    def load(self) -> Any:  # noqa: ANN401  Pillow's, whose name is private
        """Called by Pillow before everything that needs its own pixels."""
        if self._im is None:
            self.im = Image.fromarray(self._pixels).im
        return super().load()


def open_jpeg(reader: BoundedReader) -> Image.Image:
    """As Pillow's `open`, but without its own limit on pixels.

    Raises:
        UnidentifiedImageError: its header can not be read.
    """
    try:
        return JpegImagePlugin.jpeg_factory(reader, "")
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        raise UnidentifiedImageError from error


def check_scans(raw: bytes) -> bool:
    """Whether libjpeg reads several scans of a JPEG, for which it keeps all coefficients.

    Where all components are in the first scan of one that is not progressive, it reads no other.

    Raises:
        InvalidImage: a component has no scan, or a progressive one lacks the last bits of some coefficients; or it is
            coded arithmetically, where missing data looks like zeros.
    """
    frame, components = 0, b""
    whole: set[tuple[int, int]] = set()  # components, and those of their 64 coefficients that have all bits
    for marker, body, _ in _segments(raw):
        if marker in _FRAMES and not frame:
            if marker in _ARITHMETIC:
                raise InvalidImage("not a supported image (JPEG with arithmetic coding); save it with Huffman coding")
            frame, components = marker, body[6 : 6 + 3 * body[5] : 3]
        elif marker == _START_OF_SCAN and body:
            ids, (first, last, bits) = body[1 : 1 + 2 * body[0] : 2], body[1 + 2 * body[0] :][:3]
            if frame not in _PROGRESSIVE:
                if set(ids) == set(components):
                    return False
                first, last, bits = 0, 63, 0
            if bits & 15 == 0:  # the lowest bit in it
                whole |= {(component, k) for component in ids for k in range(first, last + 1)}
    if not whole.issuperset((component, k) for component in components for k in range(64)):
        raise InvalidImage("truncated JPEG: its last scans are missing")
    return True


def check_passes(pixels: int, raw: bytes) -> None:
    """Raises InvalidImage where libjpeg would pass over the `pixels` of a JPEG of several scans very often."""
    limit = _MAX_SCANNED_PIXELS // max(pixels, 1_000_000)
    if more_than(limit, rb"\xff[\xda]", raw):  # [] halves the time of the search
        raise InvalidImage(f"corrupt JPEG: more than {limit} scans")


def least_reduction(image: Image.Image, *, several_scans: bool) -> int:
    """By how much the sides of a JPEG must be reduced at least, so that it fits into memory: 1 or 2."""
    return 2 if several_scans and image.width * image.height > _HALVED_PIXELS else 1


def load_jpeg(image: Image.Image, raw: bytes, reduction: int) -> Image.Image:
    """The pixels of an open JPEG at 1/`reduction` of its sides, in mode L, CMYK, RGB or, where it is large, RGBX.

    Raises:
        OSError: some of its data is missing or damaged.
    """
    raw, size = _ended(raw), {}
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
        size = {"min_height": image.height, "min_width": image.width, "min_factor": reduction}
    large = image.width * image.height > _SMALL_PIXELS
    mode = image.mode if image.mode in {"L", "CMYK"} else "RGBX" if large else "RGB"
    try:
        if simplejpeg.decode_jpeg_header(raw, **size)[:2] != (image.height, image.width):
            return _load_tolerantly(image, raw)  # before memory is taken for another size than was checked
        pixels = simplejpeg.decode_jpeg(raw, "GRAY" if mode == "L" else mode, **size)
    except (ValueError, KeyError) as error:  # KeyError: a subsampling that it has no name for, such as 4:4:1
        _refuse_damage(error)
        return _load_tolerantly(image, raw)
    if mode == "RGB":
        return _Pixels(pixels)
    if mode == "CMYK":  # stored inverted, as Adobe does
        pixels ^= 255
    return Image.frombuffer(mode, image.size, pixels, "raw", mode, 0, 1)  # without a copy


def check_inner_jpeg(raw: bytes, most: int) -> None:
    """Refuse a JPEG inside another file that lacks pixels, or has more than `most`."""
    raw = _ended(raw)
    with suppress(ValueError, KeyError):  # a file that simplejpeg can't read is checked by its decoder
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
        if height * width > most:
            raise InvalidImage("corrupt JPEG: it is larger than its place in the file that it is in")
        try:
            simplejpeg.decode_jpeg(raw, "CMYK" if colours in {"CMYK", "YCCK"} else "RGB", min_factor=8)
        except ValueError as error:
            _refuse_damage(error)


def _ended(raw: bytes) -> bytes:
    return raw if raw.endswith(_END) else raw + _END


def _refuse_damage(error: Exception) -> None:
    """Raise OSError, as Pillow would, if libjpeg's warning means that pixels are missing."""
    warning = str(error).removeprefix("Corrupt JPEG data: ")
    if any(words in warning for words in _MISSING):
        raise OSError(f"image file is truncated ({warning})") from error
    if any(words in warning for words in _DAMAGED):
        raise OSError(warning) from error


def _load_tolerantly(image: Image.Image, raw: bytes) -> Image.Image:
    """Load with Pillow, where libjpeg has other warnings or simplejpeg does not support the subsampling of colours.

    Without an end marker, libjpeg waits for more data when it has read all of a scan and misses pixels, and Pillow
    refuses the file; when it misses none it ends. For several scans it needs the marker.
    """
    starts = [end for marker, _, end in _segments(raw) if marker == _START_OF_SCAN]
    if len(starts) == 1 and (end := _MARKER.search(raw, starts[0])):
        raw = raw[: end.start()] + _LOOKED_AT
    vars(image)["fp"] = BoundedReader(raw)
    image.load()
    return image


def _segments(raw: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, body (without its length) and end of each segment up to the end of the image."""
    position = 2
    for _ in range(_MOST_SEGMENTS):
        if not (found := _MARKER.search(raw, position)) or (marker := raw[found.end() - 1]) == _END_OF_IMAGE:
            return
        start = position = found.end()
        if marker not in _BARE:
            position += int.from_bytes(raw[start : start + 2])
            yield marker, raw[start + 2 : position], position
    raise InvalidImage("corrupt JPEG: too many segments")
