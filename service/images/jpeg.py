"""The pixels of a JPEG: all of them or an error.

libjpeg fills missing pixels with grey and only warns, and Pillow drops its warnings. simplejpeg, with the same library,
reports them. A JPEG without an end marker is whole if nothing else is missing, so every file gets one.
"""

import re
import struct
from collections.abc import Iterator
from hashlib import blake2b
from math import ceil
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from service.errors import InvalidImage
from service.images.header import LOSSLESS
from service.images.limits import BoundedReader, more_than
from service.images.resampling import strips

_END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan FF 00 is data, and FF D0 to FF D7 restart it
_MOST_SEGMENTS = 20_000
_HEADER_BYTES = 4096  # in which a JPEG-LS that begins as a JPEG has its frame
_BARE = {0x01, 0xD8, *range(0xD0, 0xD8)}  # markers without a segment
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE, _ARITHMETIC = {0xC2, 0xCA}, range(0xC9, 0xD0)
_START_OF_SCAN, _END_OF_IMAGE, _RESTARTS = 0xDA, 0xD9, 0xDD
_MAX_SCANNED_PIXELS = 2_000_000_000  # passes over the pixels of a JPEG, 0.3 s per billion; real ones make 10
_HALVED_PIXELS = 2**24  # above, a JPEG of several scans is read at half its sides: libjpeg keeps 8 bytes per pixel
# Words of libjpeg's warnings; its other warnings are about bytes that no pixel needs, or about the header.
_MISSING = ("premature end", "Premature end")
_DAMAGED = ("bad Huffman code", "instead of RST")
_SMALL_PIXELS = 2**21  # up to here the resampling wants three bytes per pixel, above it would be a copy too many
# Read where the data of the last scan ends: 8 bytes, which libjpeg looks ahead, and of which little is a whole block.
_FILLERS = (bytes(8), b"\xff\0" * 8, b"\x22\x91\xd3\x08\xa6\x5b\x0e\x7c", b"\x9a\x4d\x64\xf1\x37\xc8\x85\x1b")


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
        InvalidImage: it has another number of bits or components than is read.
        UnidentifiedImageError: its header can not be read.
    """
    try:
        return JpegImagePlugin.jpeg_factory(reader, "")
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        if b"\xff\xf7" in reader.getvalue()[:_HEADER_BYTES]:
            raise InvalidImage("not a supported image (JPEG-LS; convert it to JPEG or PNG)") from error
        if (reason := str(error)).startswith("cannot handle"):  # so many bits or components
            raise InvalidImage(
                f"not a supported image (JPEG: {reason}); save it with 8 bits, in grey or RGB"
            ) from error
        raise UnidentifiedImageError from error


def check_scans(raw: bytes) -> bool:
    """Whether libjpeg reads several scans of a JPEG, for which it keeps all coefficients.

    Where all components are in the first scan of one that is not progressive, it reads no other.

    Raises:
        InvalidImage: a component has no scan, or a progressive one lacks the last bits of some coefficients; or it is
            coded arithmetically, or lossless.
    """
    frame, components = 0, b""
    whole: set[tuple[int, int]] = set()  # components, and those of their 64 coefficients that have all bits
    for marker, body, _ in _segments(raw):
        if marker in _FRAMES and not frame:
            _check_coding(marker)
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


def _check_coding(frame: int) -> None:
    """Refuse frames that simplejpeg must not be given.

    Arithmetic coding does not show what is missing. A lossless JPEG can't be read at reduced size: libjpeg-turbo would
    write all its pixels into memory for the reduced ones.
    """
    if frame in LOSSLESS:
        raise InvalidImage("not a supported image (lossless JPEG); save it as a usual JPEG or PNG")
    if frame in _ARITHMETIC:
        raise InvalidImage("not a supported image (JPEG with arithmetic coding); save it with Huffman coding")


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
        _reduced(image, reduction)
        size = {"min_height": image.height, "min_width": image.width, "min_factor": reduction}
    large = image.width * image.height > _SMALL_PIXELS
    mode = image.mode if image.mode in {"L", "CMYK"} else "RGBX" if large else "RGB"
    try:
        if simplejpeg.decode_jpeg_header(raw, **size)[:2] != (image.height, image.width):
            return _load_tolerantly(image, raw, reduction)  # before memory is taken for another size than was checked
        pixels = simplejpeg.decode_jpeg(raw, "GRAY" if mode == "L" else mode, **size)
    except (ValueError, KeyError) as error:  # KeyError: a subsampling that it has no name for, such as 4:4:1
        _refuse_damage(error)
        return _load_tolerantly(image, raw, reduction)
    if mode == "RGB":
        return _Pixels(pixels)
    if mode == "CMYK":  # stored inverted, as Adobe does
        pixels ^= 255
    return Image.frombuffer(mode, image.size, pixels, "raw", mode, 0, 1)  # without a copy


def check_inner_jpeg(raw: bytes, most: int) -> None:
    """Refuse a JPEG inside another file that lacks pixels, or has more than `most`, or is not read at all."""
    for marker, *_ in _segments(raw):
        if marker in _FRAMES:
            _check_coding(marker)
    try:
        image = open_jpeg(BoundedReader(raw))
    except UnidentifiedImageError:  # its decoder says what is wrong
        return
    if image.width * image.height > most:
        raise InvalidImage("corrupt JPEG: it is larger than its place in the file that it is in")
    load_jpeg(image, raw, 8)


def _ended(raw: bytes) -> bytes:
    return raw if raw.endswith(_END) else raw + _END


def _refuse_damage(error: Exception) -> None:
    """Raise OSError, as Pillow would, if libjpeg's warning means that pixels are missing."""
    warning = str(error).removeprefix("Corrupt JPEG data: ")
    if any(words in warning for words in _MISSING):
        raise OSError(f"image file is truncated ({warning})") from error
    if any(words in warning for words in _DAMAGED):
        raise OSError(warning) from error


def _load_tolerantly(image: Image.Image, raw: bytes, reduction: int) -> Image.Image:
    """Load with Pillow, where libjpeg has other warnings or simplejpeg does not support the subsampling of colours.

    Pillow drops warnings, so missing data is found by what libjpeg reads in its place. Without an end marker it waits
    when that is too little, and Pillow refuses the file; for several scans it needs the marker. Else the pixels depend
    on what was read.
    """
    scans = [end for marker, _, end in _segments(raw) if marker == _START_OF_SCAN]
    found = _MARKER.search(raw, scans[-1]) if scans else None
    data = raw[: found.start() if found else len(raw)].removesuffix(b"\xff")
    closing = _END if len(scans) > 1 else b""
    if _missing_restarts(data):
        raise OSError("image file is truncated (restart markers are missing)")
    seen = set()
    for filler in _FILLERS[1:]:
        seen.add(_digest(_reduced(open_jpeg(BoundedReader(data + filler + closing)), reduction)))
    vars(image)["fp"] = BoundedReader(data + _FILLERS[0] + closing)
    image.load()  # the others' memory is free again
    if seen != {_digest(image)}:
        raise OSError("image file is truncated (its last scan)")
    return image


def _missing_restarts(data: bytes) -> bool:
    """Whether the last scan, with which `data` ends, has fewer restart markers than its blocks need."""
    every, height, width, factors, ids, start = 0, 0, 0, {}, b"", 0
    for marker, body, end in _segments(data):
        if marker == _RESTARTS:
            every = int.from_bytes(body[:2])
        elif marker in _FRAMES:
            height, width = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
            factors = {body[at]: (body[at + 1] >> 4, body[at + 1] & 15) for at in range(6, 4 + 3 * body[5], 3)}
        elif marker == _START_OF_SCAN:
            ids, start = body[1 : 1 + 2 * body[0] : 2], end
    across, down = (8 * max(each) for each in zip(*factors.values(), strict=True))
    if len(ids) == 1:  # the blocks of one component, without those that others would add
        across, down = across / factors[ids[0]][0], down / factors[ids[0]][1]
    needed = -(-ceil(width / across) * ceil(height / down) // every) - 1 if every else 0
    return sum(data.count(bytes((0xFF, marker)), start) for marker in range(0xD0, 0xD8)) < needed


def _reduced(image: Image.Image, reduction: int) -> Image.Image:
    """The same image, set to be read at 1/`reduction` of its sides."""
    image.draft(None, (image.width // reduction, image.height // reduction))
    return image


def _digest(image: Image.Image) -> bytes:
    image.load()
    digest = blake2b()
    for box in strips(image):
        digest.update(image.crop(box).tobytes())
    return digest.digest()


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
