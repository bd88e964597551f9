"""Limits on the cost of decoding an image, checked before it is decoded: pixels, memory, parts of a hostile file."""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import PIL
from PIL import Image

from service.errors import ImageTooLarge, InvalidImage, MemoryExhausted

# Limits on a hostile file beyond its bytes and pixels; real images stay far below each.
_MAX_SIDE = 65_535  # JPEG's own; costs per row and Pillow's float32 boxes are fine up to there
_MAX_READS = 100_000  # by Pillow in Python, for it walks markers, chunks and blocks there: 0.1 s
_MAX_TIFF_VALUES = 65_536  # of one TIFF tag: Pillow makes a Python object of each
_MAX_BYTES = 9  # of memory per pixel of the limit: 4 of the image, as much in the decoder, and small parts
# Per pixel: libwebp's two canvases, the planes of libavif and libheif with their RGB, Pillow's copy.
_CODEC_BYTES = {
    ("WEBP", "RGB"): 12,
    ("WEBP", "RGBA"): 12,
    ("AVIF", "RGB"): 12,
    ("AVIF", "RGBA"): 16,
    ("HEIF", "L"): 4,
    ("HEIF", "LA"): 8,
    ("HEIF", "RGB"): 9,
    ("HEIF", "RGBA"): 12,
}
_DEEP_HEIF_BYTES = {"I;16": 12, "LA": 16, "RGB": 15, "RGBA": 20}  # of 10 and 12 bits, whose planes have 16
# Pixels of a JPEG of one scan that are read at 1/8 of their sides in less time than one pixel of a PNG is decoded.
READ_PIXELS = 8
_MOST_PIXELS = 178_956_970  # Pillow's own limit on every file, whatever the setting
_MAX_REPEATS = 16  # of these blocks, whose handling adds up; there should be one
_ONCE = {"JPEG": rb"Exif\0\0", "PNG": b"iCCP"}
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
        raise MemoryExhausted(
            f"the {name} image does not fit into memory now; send it again later, or smaller", retry_after_seconds=2.0
        ) from error
    except _FOREIGN as error:
        message = str(error).lower()
        if message.startswith("unsupported"):  # Pillow's word for a form that it can't read
            usual = "with 24 bits per pixel, uncompressed" if name == "BMP" else "in its usual form"
            raise InvalidImage(f"not a supported image ({name}: {message}); save it {usual}") from error
        state = "truncated" if isinstance(error, EOFError) or "truncated" in message else "corrupt"
        reason = not isinstance(error, PIL.UnidentifiedImageError) and " ".join(str(error).split())  # in one line
        raise InvalidImage(f"{state} {name}: {reason or 'its header can not be read'}") from error


def too_large(size: str, limit: int, counted: str = "", hint: str = "") -> ImageTooLarge:
    """The error for an image of `size` megapixels where `limit` pixels are allowed."""
    limits = f"the limit is {limit / 1e6:.4g} (PVT_MAX_IMAGE_MEGAPIXELS)"
    return ImageTooLarge(f"the image has {size} megapixels{counted}, {limits}{hint}")


def check_size(image: Image.Image, max_pixels: int) -> None:
    """Raises ImageTooLarge when the image's sides, or the memory for decoding it, are too large.

    Not for a JPEG, of which `check_jpeg_size` counts what is decoded.
    """
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise too_large(f"{pixels / 1e6:.4g}", max_pixels)
    if max(image.size) > _MAX_SIDE:
        raise ImageTooLarge(f"the image has {max(image.size)} pixels on a side, the limit is {_MAX_SIDE}")
    check_memory(codec_bytes(image) * pixels, max_pixels)


def codec_bytes(image: Image.Image) -> int:
    """The most bytes of memory per pixel that an open WebP, AVIF or HEIF takes; 0 of other formats."""
    if image.format == "HEIF" and (image.info["bit_depth"] > 8 or image.mode == "I;16"):  # noqa: PLR2004
        return _DEEP_HEIF_BYTES.get(image.mode, 20)
    return _CODEC_BYTES.get((image.format or "", image.mode), 0)


def counted_jpeg_pixels(pixels: int, reduction: int, *, several_scans: bool) -> int:
    """What of a JPEG's pixels counts: those that are decoded, and at least an eighth of all for the time of reading.

    Of several scans all count, whatever the `reduction`, because libjpeg keeps all coefficients.
    """
    return pixels if several_scans else max(-(-pixels // reduction**2), pixels // READ_PIXELS)


def check_jpeg_size(pixels: int, reduction: int, max_pixels: int, *, several_scans: bool) -> None:
    """Raises ImageTooLarge when too much of a JPEG of `pixels`, read at 1/`reduction` of its sides, is decoded."""
    counted = counted_jpeg_pixels(pixels, reduction, several_scans=several_scans)
    if counted <= max_pixels:
        return
    as_much = "" if counted == pixels else f", counted as {counted / 1e6:.4g}"
    fits = several_scans and pixels <= READ_PIXELS * max_pixels
    hint = "; a progressive JPEG is decoded in full, a baseline one may be larger" if fits else ""
    raise too_large(f"{pixels / 1e6:.4g}", max_pixels, as_much, hint)


def check_memory(size: float, max_pixels: int) -> None:
    """Raises ImageTooLarge when decoding takes `size` bytes and that is too much."""
    if size > _MAX_BYTES * max_pixels:
        limits = f"{_MAX_BYTES * max_pixels / 1e6:.4g} ({_MAX_BYTES} for each of PVT_MAX_IMAGE_MEGAPIXELS)"
        raise ImageTooLarge(f"decoding the image takes {size / 1e6:.4g} megabytes, the limit is {limits}")


def more_than(limit: int, pattern: bytes, raw: bytes) -> bool:
    """Whether `pattern` occurs more than `limit` times in `raw`."""
    return next(islice(re.finditer(pattern, raw), limit, None), None) is not None


def check_blocks(raw: bytes, name: str) -> None:
    """Refuse a file that would cost Pillow too much as soon as it opens it."""
    if name in _ONCE and more_than(_MAX_REPEATS, _ONCE[name], raw):
        raise InvalidImage(f"corrupt {name}: too many EXIF or colour profile blocks")
    for tag, kind, count, _ in tags(raw) if name == "TIFF" else ():
        if count > _MAX_TIFF_VALUES and (kind not in _BYTES or tag in _OFFSETS):
            raise InvalidImage(f"corrupt TIFF: tag {tag} has {count} values")


def tags(tiff: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Tag, type, count and value field of each entry of the first directory."""
    if tiff[2:4] in {b"+\0", b"\0+"}:
        raise InvalidImage("not a supported image (BigTIFF); save it as a usual TIFF or as PNG")
    order = "<" if tiff[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", tiff, 4)[0] + 2
    entries = min(struct.unpack_from(order + "H", tiff, start - 2)[0], (len(tiff) - start) // 12)
    yield from struct.iter_unpack(order + "HHI4s", tiff[start : start + 12 * entries])
