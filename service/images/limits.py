"""Limits on the cost of decoding an image, checked before it is decoded: pixels, memory, parts of a hostile file."""

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import PIL
from PIL import ExifTags, Image, TiffImagePlugin

from service.errors import ImageTooLarge, InvalidImage

# Limits on a hostile file beyond its bytes and pixels; real images stay far below each.
_MAX_SIDE = 65_535  # JPEG's own; costs per row and Pillow's float32 boxes are fine up to there
_MAX_READS = 100_000  # by Pillow in Python, for it walks markers, chunks and blocks there: 0.1 s
_MAX_SCANNED_PIXELS = 2_000_000_000  # passes over the pixels of a JPEG, 0.3 s per billion; real ones make 10
_MAX_TIFF_VALUES = 65_536  # of one TIFF tag: Pillow makes a Python object of each
_MAX_BYTES = 9  # of memory per pixel of the limit: 4 of the image, as much in the decoder, and small parts
_HELD_BYTES = {  # per pixel: libwebp's two canvases, libavif's planes of 16 bits and its RGB, and Pillow's copy of it
    ("WEBP", "RGB"): 12,
    ("WEBP", "RGBA"): 12,
    ("AVIF", "RGB"): 12,
    ("AVIF", "RGBA"): 16,
}
# Above this a JPEG of several scans is read at half its sides: libjpeg keeps 8 bytes per pixel of it.
_HALVED_PIXELS = 2**24
_MOST_PIXELS = 178_956_970  # Pillow's own limit on every file, whatever the setting
_MAX_REPEATS = 16  # of these blocks, whose handling adds up; there should be one
_ONCE: Mapping[str, bytes] = {"JPEG": rb"Exif\0\0", "PNG": b"iCCP"}
_BYTES = {1, 2, 7}  # TIFF types that Pillow keeps as they are: BYTE, ASCII, UNDEFINED
_OFFSETS = {273, 324}  # TIFF tags that Pillow loops over whatever their type: StripOffsets, TileOffsets
_LOGIC_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError)
_FOREIGN = (OSError, EOFError, SyntaxError, struct.error, zlib.error, *_LOGIC_ERRORS)


class BoundedReader(io.BytesIO):
    """A file in memory that limits the number of reads; it has no descriptor that libtiff could read from."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file; raises InvalidImage after too many calls."""
        self.reads += 1
        if self.reads > _MAX_READS:
            raise InvalidImage("corrupt image: too many segments")
        return super().read(size)


@contextmanager
def map_errors(name: str, max_pixels: int) -> Iterator[None]:
    """Turn all errors that Pillow may raise for a file into our own."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise too_large(f"over {_MOST_PIXELS / 1e6:.4g}", min(max_pixels, _MOST_PIXELS)) from error
    except MemoryError as error:
        raise ImageTooLarge(f"the {name} image does not fit into memory") from error
    except _FOREIGN as error:
        told = str(error).lower()
        if told.startswith("unsupported"):  # Pillow's word for a form that it can't read
            raise InvalidImage(f"not a supported image ({name}: {told}); save it in its usual form") from error
        state = "truncated" if isinstance(error, EOFError) or "truncated" in told else "corrupt"
        reason = not isinstance(error, PIL.UnidentifiedImageError) and str(error)
        raise InvalidImage(f"{state} {name}: {reason or 'its header can not be read'}") from error


def too_large(size: str, limit: int) -> ImageTooLarge:
    """The error for an image of `size` megapixels where `limit` pixels are allowed."""
    limits = f"the limit is {limit / 1e6:.4g} (PVT_MAX_IMAGE_MEGAPIXELS)"
    return ImageTooLarge(f"the image has {size} megapixels, {limits}")


def _more_than(limit: int, pattern: bytes, raw: bytes) -> bool:
    return next(islice(re.finditer(pattern, raw), limit, None), None) is not None


def check_size(image: Image.Image, max_pixels: int) -> tuple[int, int]:
    """The image's width and height; raises ImageTooLarge when they, or the memory for decoding, are too large."""
    if image.width * image.height > max_pixels:
        raise too_large(f"{image.width * image.height / 1e6:.4g}", max_pixels)
    if max(image.size) > _MAX_SIDE:
        raise ImageTooLarge(f"the image has {max(image.size)} pixels on a side, the limit is {_MAX_SIDE}")
    _check_memory(_HELD_BYTES.get((image.format or "", image.mode), 0) * image.width * image.height, max_pixels)
    return image.size


def _check_memory(size: float, max_pixels: int) -> None:
    if size > _MAX_BYTES * max_pixels:
        limits = f"{_MAX_BYTES * max_pixels / 1e6:.4g} ({_MAX_BYTES} for each of PVT_MAX_IMAGE_MEGAPIXELS)"
        raise ImageTooLarge(f"decoding the image takes {size / 1e6:.4g} megabytes, the limit is {limits}")


def check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Refuse a TIFF whose tiles or strips take more memory or time than its pixels; libtiff decodes them whole."""
    if vars(image)["tile"][0][0] != "libtiff":
        return  # Pillow reads uncompressed ones row by row
    read: Mapping[int, Any] = vars(image)["tag_v2"]
    width, height = read[TiffImagePlugin.IMAGEWIDTH], read[TiffImagePlugin.IMAGELENGTH]
    rows = min(height, read.get(TiffImagePlugin.ROWSPERSTRIP, height))
    across, down = read.get(TiffImagePlugin.TILEWIDTH, width), read.get(TiffImagePlugin.TILELENGTH, rows)
    covered = -(-width // across) * across * -(-height // down) * down
    if covered - width * height > max_pixels:
        raise too_large(f"{covered / 1e6:.4g}", max_pixels)
    bits = read.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    pixel = 1 if image.mode in {"1", "L", "P"} else 4
    block = across * down * max(pixel, max(bits) * max(len(bits), read.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)) / 8)
    turns = read.get(ExifTags.Base.Orientation, 1) != 1 or TiffImagePlugin.XMP in read  # XMP may have it too
    _check_memory(
        block + pixel * (1 + turns) * width * height, max_pixels
    )  # turned by Pillow while libtiff keeps its copy


def check_blocks(raw: bytes, name: str) -> None:
    """Refuse a file that would cost Pillow too much as soon as it opens it."""
    if name in _ONCE and _more_than(_MAX_REPEATS, _ONCE[name], raw):
        raise InvalidImage(f"corrupt {name}: too many EXIF or colour profile blocks")
    for tag, kind, count, _ in tags(raw) if name == "TIFF" else ():
        if count > _MAX_TIFF_VALUES and (kind not in _BYTES or tag in _OFFSETS):
            raise InvalidImage(f"corrupt TIFF: tag {tag} has {count} values")


def check_scans(image: Image.Image, raw: bytes, start: int) -> int:
    """Refuse a JPEG that makes libjpeg pass over the pixels very often; its first scan's data begins at `start`.

    Returns by how much its sides must be reduced at least, so that it fits into memory: 1 or 2.
    """
    layers = len(image.getbands())
    complete = raw.startswith(bytes((0xFF, 0xDA, 0, 6 + 2 * layers, layers)), max(0, start - 2 * layers - 8))
    if complete and "progressive" not in image.info:
        return 1  # all layers are in the first scan, so libjpeg reads no other
    limit = _MAX_SCANNED_PIXELS // max(image.width * image.height, 1_000_000)
    if _more_than(limit, rb"\xff[\xda]", raw):  # [] halves the time of the search
        raise InvalidImage(f"corrupt JPEG: more than {limit} scans")
    return 2 if image.width * image.height > _HALVED_PIXELS else 1


def tags(tiff: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Tag, type, count and value field of each entry of the first directory."""
    if tiff[2:4] in {b"+\0", b"\0+"}:
        raise InvalidImage("not a supported image (BigTIFF)")
    order = "<" if tiff[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", tiff, 4)[0] + 2
    entries = min(struct.unpack_from(order + "H", tiff, start - 2)[0], (len(tiff) - start) // 12)
    yield from struct.iter_unpack(order + "HHI4s", tiff[start : start + 12 * entries])
