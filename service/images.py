"""Bytes of a picture -> the model's uint8 input, as people see the picture.

EXIF orientation is applied, transparency lies on white, of several frames the first counts, deep grey keeps its range;
ICC profiles and gamma are ignored, as in the models' training. Formats are few, headers bounded, errors our own.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import AvifImagePlugin, ExifTags, Image, ImageCms, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from service.errors import ImageTooLarge, InvalidImage

Box = tuple[float, float, float, float]  # left, top, right, bottom; in pixels

FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", *(["AVIF"] if AvifImagePlugin.SUPPORTED else []))
# What a hostile file may cost beyond its bytes and pixels; real pictures stay far below each.
_MAX_SIDE = 65_535  # JPEG's own; costs per row and Pillow's float32 boxes are fine up to there
_MAX_READS = 100_000  # by Pillow in Python, for it walks markers, chunks and blocks there: 0.1 s
_MAX_SCANNED_PIXELS = 2_000_000_000  # passes over the pixels of a JPEG, 0.3 s per billion; real ones make 10
_MAX_TIFF_VALUES = 65_536  # of one TIFF tag: Pillow makes a Python object of each
_MAX_BYTES = 9  # of memory per pixel of the limit: 4 of the picture, as much in the decoder, and what is small
_HELD_BYTES = {  # per pixel: libwebp's two canvases, libavif's planes of 16 bits and its RGB, and Pillow's copy of it
    ("WEBP", "RGB"): 12,
    ("WEBP", "RGBA"): 12,
    ("AVIF", "RGB"): 12,
    ("AVIF", "RGBA"): 16,
}
_HALVED_PIXELS = (
    2**24
)  # above, a JPEG of several scans is read at half its sides: libjpeg keeps 8 bytes per pixel of it
_STRIP_PIXELS = 2**19  # of a larger picture, what is converted at a time
_MOST_PIXELS = 178_956_970  # Pillow's own limit on all it opens, whatever the setting
_MAX_REPEATS = 16  # of these blocks, whose handling adds up; there should be one
_ONCE: Mapping[str, bytes] = {"JPEG": rb"Exif\0\0", "PNG": b"iCCP"}
_ORIENTATION = (0x0112, 3, 1)  # the tag, its type SHORT, one value
_BYTES = {1, 2, 7}  # TIFF types that Pillow keeps as they are: BYTE, ASCII, UNDEFINED
_OFFSETS = {273, 324}  # TIFF tags that Pillow loops over whatever their type: StripOffsets, TileOffsets
# EXIF orientations by what sets them upright: mirrored left-right, top-bottom, and then width and height swapped
_MIRRORED, _UPSIDE_DOWN, _SIDEWAYS = {2, 3, 7, 8}, {3, 4, 6, 7}, {5, 6, 7, 8}
_LOGIC_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError)
_FOREIGN = (OSError, EOFError, SyntaxError, struct.error, zlib.error, *_LOGIC_ERRORS)

_LAB_TO_RGB = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")

Image.init()  # all plugins now, not in the first request's thread
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the thread pool already has one thread per core
# Pillow tells of odd metadata by `warnings`, which nobody would read here, and `catch_warnings` is not thread-safe.
for _module in (Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin):
    vars(_module)["warnings"] = SimpleNamespace(warn=lambda *_args, **_kwargs: None)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The model's input size; `crop` is the share of a picture's shorter side that the centre crop keeps."""

    height: int
    width: int
    crop: float
    interpolation: Literal["bilinear", "bicubic"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """The model's input, C-contiguous (height, width, 3), and the size of the upright source picture."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def decode(data: bytes | bytearray | memoryview, geometry: Geometry, *, max_pixels: int) -> Decoded:
    """The picture in `data`, upright, in RGB, resized and centre-cropped to `geometry`; the pixels are read-only.

    Raises:
        InvalidImage: it is empty, in no supported format, truncated or corrupt.
        ImageTooLarge: it has more than `max_pixels` pixels, or its decoding takes more than 9 bytes for each of them;
            nothing was decoded.
    """
    name = _format(raw := bytes(data))
    with _map_errors(name, max_pixels):
        _check_blocks(raw, name)
        with Image.open(reader := _BoundedReader(raw), formats=(name.upper(),)) as image:
            size = _check_size(image, max_pixels)
            if name == "JPEG":
                _check_scans(image, raw, reader.tell())
            elif name == "TIFF":
                _check_tiles(image, max_pixels)
                vars(image)["is_animated"] = True  # keeps Pillow from reading all its EXIF, which may take seconds
            picture = _load(image)
            if name != "JPEG":  # which may be read at half its size
                size = picture.size  # XMP may have turned a TIFF
            turn = 1 if name == "TIFF" else _orientation(image.info.get("exif", b""))  # Pillow turns a TIFF itself
            upright = size[::-1] if turn in _SIDEWAYS else size
            left, top, right, bottom = _source_box(crop_box(*upright, geometry), size, turn)
            part = 1 if picture.size == size else 0.5
            box = left * part, top * part, right * part, bottom * part
            return Decoded(_fit(picture, box, turn, geometry), *upright)


def crop_box(width: int, height: int, geometry: Geometry) -> Box:
    """The region that the published two steps keep, in the picture's own coordinates.

    They are torchvision's: resize the shorter side to `round(size / crop)`, 249 for 224 and 0.9, the longer one to the
    integer below its share, then crop the centre. A target that isn't square is covered by the resized picture too.
    """
    across, down = round(geometry.width / geometry.crop), round(geometry.height / geometry.crop)
    across, down = max(across, down * width // height), max(down, across * height // width)
    left, top = round((across - geometry.width) / 2), round((down - geometry.height) / 2)
    right, bottom, x, y = left + geometry.width, top + geometry.height, width / across, height / down
    return left * x, top * y, min(right * x, width), min(bottom * y, height)


class _BoundedReader(io.BytesIO):
    """A file in memory that ends too long a walk; it has no descriptor that libtiff could read from."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise InvalidImage("corrupt image: too many segments")
        return super().read(size)


@contextmanager
def _map_errors(name: str, max_pixels: int) -> Iterator[None]:
    """Turns all that Pillow may raise on a file into our own errors."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise _too_large(f"over {_MOST_PIXELS / 1e6:.4g}", min(max_pixels, _MOST_PIXELS)) from error
    except MemoryError as error:
        raise ImageTooLarge(f"the {name} picture does not fit into memory") from error
    except _FOREIGN as error:
        state = "truncated" if isinstance(error, EOFError) or "truncated" in str(error).lower() else "corrupt"
        told = not isinstance(error, PIL.UnidentifiedImageError) and str(error)
        raise InvalidImage(f"{state} {name}: {told or 'its header can not be read'}") from error


def _too_large(size: str, limit: int) -> ImageTooLarge:
    limits = f"the limit is {limit / 1e6:.4g} (PVT_MAX_IMAGE_MEGAPIXELS)"
    return ImageTooLarge(f"the picture has {size} megapixels, {limits}")


def _format(raw: bytes) -> str:
    for name in FORMATS:
        _, accept = Image.OPEN[name.upper()]
        if accept and accept(raw[:16]) is True:
            return name
    raise InvalidImage(f"not a supported image ({', '.join(FORMATS)})" if raw else "empty: the image has no bytes")


def _more_than(limit: int, pattern: bytes, raw: bytes) -> bool:
    return next(islice(re.finditer(pattern, raw), limit, None), None) is not None


def _check_size(image: Image.Image, max_pixels: int) -> tuple[int, int]:
    if image.width * image.height > max_pixels:
        raise _too_large(f"{image.width * image.height / 1e6:.4g}", max_pixels)
    if max(image.size) > _MAX_SIDE:
        raise ImageTooLarge(f"the picture has {max(image.size)} pixels on a side, the limit is {_MAX_SIDE}")
    _check_memory(_HELD_BYTES.get((image.format or "", image.mode), 0) * image.width * image.height, max_pixels)
    return image.size


def _check_memory(size: float, max_pixels: int) -> None:
    if size > _MAX_BYTES * max_pixels:
        limits = f"{_MAX_BYTES * max_pixels / 1e6:.4g} ({_MAX_BYTES} for each of PVT_MAX_IMAGE_MEGAPIXELS)"
        raise ImageTooLarge(f"decoding the picture takes {size / 1e6:.4g} megabytes, the limit is {limits}")


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Refuses a TIFF whose tiles or strips take more memory or time than its pixels; libtiff decodes them whole."""
    if vars(image)["tile"][0][0] != "libtiff":
        return  # Pillow reads uncompressed ones row by row
    tags: Mapping[int, Any] = vars(image)["tag_v2"]
    width, height = tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
    rows = min(height, tags.get(TiffImagePlugin.ROWSPERSTRIP, height))
    across, down = tags.get(TiffImagePlugin.TILEWIDTH, width), tags.get(TiffImagePlugin.TILELENGTH, rows)
    covered = -(-width // across) * across * -(-height // down) * down
    if covered - width * height > max_pixels:
        raise _too_large(f"{covered / 1e6:.4g}", max_pixels)
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    pixel = 1 if image.mode in {"1", "L", "P"} else 4
    block = across * down * max(pixel, max(bits) * max(len(bits), tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)) / 8)
    turns = tags.get(ExifTags.Base.Orientation, 1) != 1 or TiffImagePlugin.XMP in tags  # XMP may tell it too
    _check_memory(block + pixel * (1 + turns) * width * height, max_pixels)  # turned by Pillow while libtiff holds on


def _check_blocks(raw: bytes, name: str) -> None:
    """Refuses what would cost Pillow too much as soon as it opens the file."""
    if name in _ONCE and _more_than(_MAX_REPEATS, _ONCE[name], raw):
        raise InvalidImage(f"corrupt {name}: too many EXIF or colour profile blocks")
    for tag, kind, count, _ in _tags(raw) if name == "TIFF" else ():
        if count > _MAX_TIFF_VALUES and (kind not in _BYTES or tag in _OFFSETS):
            raise InvalidImage(f"corrupt TIFF: tag {tag} has {count} values")


def _check_scans(image: Image.Image, raw: bytes, start: int) -> None:
    """Refuses a JPEG that makes libjpeg pass over the pixels very often; its first scan's data begins at `start`."""
    layers = len(image.getbands())
    complete = raw.startswith(bytes((0xFF, 0xDA, 0, 6 + 2 * layers, layers)), max(0, start - 2 * layers - 8))
    if complete and "progressive" not in image.info:
        return  # all layers are in the first scan, so libjpeg reads no other
    limit = _MAX_SCANNED_PIXELS // max(image.width * image.height, 1_000_000)
    if _more_than(limit, rb"\xff[\xda]", raw):  # [] halves the time of the search
        raise InvalidImage(f"corrupt JPEG: more than {limit} scans")
    if image.width * image.height > _HALVED_PIXELS:
        image.draft(None, (image.width // 2, image.height // 2))


def _load(image: Image.Image) -> Image.Image:
    """The first frame; of WebP and AVIF without what Pillow holds of it at once, up to five copies."""
    if image.format not in {"WEBP", "AVIF"}:
        image.load()
        return image
    decoder = vars(image).pop("_decoder")
    frame = decoder.get_frame(0) if image.format == "AVIF" else decoder.get_next()
    if frame is None:
        raise InvalidImage("corrupt WebP: its first frame can not be decoded")
    del decoder  # with its canvases
    mode = getattr(image, "rawmode", image.mode)  # a WebP's may be RGBX, then without transparency
    return Image.frombuffer(mode, image.size, frame[0], "raw", mode, 0, 1)


def _tags(tiff: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Tag, type, count and value field of each entry of the first directory."""
    if tiff[2:4] in {b"+\0", b"\0+"}:
        raise InvalidImage("not a supported image (BigTIFF)")
    order = "<" if tiff[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", tiff, 4)[0] + 2
    entries = min(struct.unpack_from(order + "H", tiff, start - 2)[0], (len(tiff) - start) // 12)
    yield from struct.iter_unpack(order + "HHI4s", tiff[start : start + 12 * entries])


def _orientation(exif: bytes) -> int:
    """1 to 8; 1 where there is none or the block is broken, as browsers do."""
    with suppress(struct.error, TypeError, InvalidImage):  # TypeError: a PNG's text chunk named "exif" is no bytes
        tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
        for *entry, value in _tags(tiff):
            if tuple(entry) == _ORIENTATION:
                turn = int.from_bytes(value[:2], "little" if tiff[:2] == b"II" else "big")
                return turn if turn in range(1, 9) else 1
    return 1


def _source_box(box: Box, size: tuple[int, int], turn: int) -> Box:
    """Where `box` of the upright picture lies in the picture as it is stored."""
    left, top, right, bottom = (box[1], box[0], box[3], box[2]) if turn in _SIDEWAYS else box
    if turn in _MIRRORED:
        left, right = size[0] - right, size[0] - left
    if turn in _UPSIDE_DOWN:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _fit(picture: Image.Image, box: Box, turn: int, geometry: Geometry) -> NDArray[np.uint8]:
    """Resizes what `box` holds, and only then turns it and spreads grey to RGB: there are far fewer pixels then."""
    size = (geometry.height, geometry.width) if turn in _SIDEWAYS else (geometry.width, geometry.height)
    filtered = Image.Resampling[geometry.interpolation.upper()]
    if picture.mode not in {"RGB", "L"} or picture.has_transparency_data:
        picture, box = _visible(picture, box, size, filtered)
    if picture.size != size or box != (0, 0, *size):
        picture = picture.resize(size, filtered, box=box)
    pixels = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    pixels = pixels[:: -1 if turn in _UPSIDE_DOWN else 1, :: -1 if turn in _MIRRORED else 1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if turn in _SIDEWAYS else pixels)


def _visible(
    picture: Image.Image, box: Box, size: tuple[int, int], filtered: Image.Resampling
) -> tuple[Image.Image, Box]:
    """The picture as people see it, in mode RGB or L, and where `box` lies in it.

    A large one is converted by strips that are at once resized to the target's width, so that there is no second
    picture of its size. Pillow resizes in the same two passes, so nothing else changes.
    """
    span = _span(picture)
    if picture.width * picture.height <= _STRIP_PIXELS:
        return _seen(picture, span), box
    left, top, right, bottom = box
    reach = 2 + 2 * max(1, (bottom - top) / size[1])  # of the filters, in rows, rounded up
    above, below = max(0, int(top - reach)), min(picture.height, int(bottom + reach))
    strips = (_seen(strip, span) for strip in _strips(picture, above, below))
    narrow = [strip.resize((size[0], strip.height), filtered, box=(left, 0, right, strip.height)) for strip in strips]
    joined, y = Image.new(narrow[0].mode, (size[0], below - above)), 0
    for strip in narrow:
        joined.paste(strip, (0, y))
        y += strip.height
    return joined, (0, top - above, size[0], bottom - above)


def _strips(picture: Image.Image, above: int, below: int) -> Iterator[Image.Image]:
    rows = max(1, _STRIP_PIXELS // picture.width)
    for y in range(above, below, rows):
        yield picture.crop((0, y, picture.width, min(y + rows, below)))


def _seen(strip: Image.Image, span: tuple[float, float]) -> Image.Image:
    """`strip` in mode RGB or L; `span` is the whole picture's."""
    if strip.mode[0] in "IF":
        return Image.fromarray(_eight_bits(strip, *span))
    if strip.has_transparency_data:
        # On white: the ground of the pages, documents and product photos that most such pictures are made for.
        strip = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        (canvas := Image.new("RGB", strip.size, "white")).paste(strip, mask=strip)
        return canvas
    if strip.mode == "LAB":
        return ImageCms.applyTransform(strip, _LAB_TO_RGB) or strip
    return strip if strip.mode in {"RGB", "L"} else strip.convert("L" if strip.mode == "1" else "RGB")


def _numbers(strip: Image.Image) -> NDArray[np.float64]:
    numbers = np.asarray(strip).astype(np.float64)
    return numbers if np.isfinite(numbers).all() else np.nan_to_num(numbers, copy=False)


def _span(picture: Image.Image) -> tuple[float, float]:
    """The lowest and the highest value of a picture in mode I or F, where they decide on the scale."""
    if picture.mode not in {"I", "F"}:
        return 0, 0
    spans = [(v.min(), v.max()) for v in map(_numbers, _strips(picture, 0, picture.height))]
    return float(min(low for low, _ in spans)), float(max(high for _, high in spans))


def _eight_bits(strip: Image.Image, low: float, high: float) -> NDArray[np.uint8]:
    """Grey of more than 8 bits on 0..255, without clipping.

    Integers within 0..65535 are 16-bit grey; floats are on the smallest of 0..1, 0..255 and 0..65535 that holds them;
    what no scale holds is stretched from its darkest to its brightest value. NaN is black.
    """
    if strip.mode.startswith("I;16"):
        values = np.asarray(strip)
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        grey[values == strip.info.get("transparency", -1)] = 255  # PNG's transparent value, on white
        return grey
    numbers = _numbers(strip)
    scales = [s for s in ((1, 255, 65535) if strip.mode == "F" else (65535,)) if 0 <= low <= high <= s]
    if not scales:
        numbers = (numbers / 2 - low / 2) / (high / 2 - low / 2 or 1.0)
    return np.rint(numbers * (255 / scales[0] if scales else 255)).astype(np.uint8)
