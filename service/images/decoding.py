"""Bytes of a picture -> the model's uint8 input, as people see the picture.

EXIF orientation is applied, transparency lies on white, of several frames the first counts, deep grey keeps its range;
ICC profiles and gamma are ignored, as in the models' training. Formats are few, headers bounded, errors our own.
"""

import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from service.errors import InvalidImage
from service.images.bmp import load_bmp
from service.images.geometry import Box, crop_box
from service.images.geometry import Geometry as Geometry  # noqa: PLC0414  part of what `decode` takes
from service.images.jpeg import check_complete, ended, load_jpeg
from service.images.limits import BoundedReader, check_blocks, check_scans, check_size, map_errors, tags
from service.images.png import load_png
from service.images.resampling import resample
from service.images.tiff import describe as describe_tiff
from service.images.tiff import prepare as prepare_tiff
from service.images.visible import Grey, opaque, visible
from service.images.webp import is_animated, without_cut_chunk

FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", *(["AVIF"] if AvifImagePlugin.SUPPORTED else []))
_ORIENTATION = (0x0112, 3, 1)  # the tag, its type SHORT, one value
# EXIF orientations by what sets them upright: mirrored left-right, top-bottom, and then width and height swapped
_MIRRORED, _UPSIDE_DOWN, _SIDEWAYS = {2, 3, 7, 8}, {3, 4, 6, 7}, {5, 6, 7, 8}
# Pixels on a side that a JPEG of reduced size must still have for each of the model's input; see decision 28
_MARGIN = 2
_SIXTEEN = Grey(65_535)
_MOST_GIF_BLOCKS = 2**19  # of up to 255 bytes, in the first frame: walking them takes 0.04 s
# An AVIF may hold a larger frame than its header says, up to libavif's own limit of 268 megapixels, which costs a
# gigabyte and can't be told beforehand: one at a time, so that it is one gigabyte.
_ONE_AVIF = threading.Lock()

Image.init()  # all plugins now, not in the first request's thread
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the thread pool already has one thread per core
# Pillow tells of odd metadata by `warnings`, which nobody would read here, and `catch_warnings` is not thread-safe.
for _module in (Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin):
    vars(_module)["warnings"] = SimpleNamespace(warn=lambda *_args, **_kwargs: None)


@dataclass(frozen=True, slots=True)
class Decoded:
    """The model's input, C-contiguous (height, width, 3), and the size of the upright source picture."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def decode(
    data: bytes | bytearray | memoryview, geometry: Geometry, *, max_pixels: int, scaled_jpeg: bool = True
) -> Decoded:
    """The picture in `data`, upright, in RGB, resized and centre-cropped to `geometry`.

    A JPEG that is far larger than the model's input is decoded at a half, a quarter or an eighth of its sides, unless
    `scaled_jpeg` is off. The size in the answer is the whole picture's.

    Raises:
        InvalidImage: it is empty, in no supported format, truncated or corrupt.
        ImageTooLarge: it has more than `max_pixels` pixels, or its decoding takes more than 9 bytes for each of them;
            nothing was decoded.
    """
    name = _format(raw := bytes(data))
    with map_errors(name, max_pixels):
        check_blocks(raw, name)
        raw = without_cut_chunk(raw) if name == "WebP" else raw
        with _open(reader := BoundedReader(raw), raw, name) as image:
            size, turn, reduction, grey = (
                check_size(image, max_pixels),
                1,
                1,
                _SIXTEEN if image.mode[0] == "I" else None,
            )
            if name == "TIFF":
                grey = prepare_tiff(image, raw, max_pixels)
            else:
                turn = _orientation(image.info.get("exif", b""))
            if name == "JPEG":
                least = check_scans(image, raw, reader.tell())
                check_complete(raw)
                reduction = _reduce(image, turn, geometry, least, 8 if scaled_jpeg else 1)
                picture = load_jpeg(image, ended(raw), reduction)
            else:
                picture = _load(image, raw)
            if name == "TIFF":
                size = picture.size  # Pillow has turned it
            upright = _turned(size, turn)
            left, top, right, bottom = _source_box(crop_box(*upright, geometry), size, turn)
            # Whatever an odd size is rounded up to, a pixel of the reduced picture covers as many source pixels.
            box = left / reduction, top / reduction, right / reduction, bottom / reduction
            return Decoded(_fit(picture, box, turn, geometry, grey), *upright)


def _format(raw: bytes) -> str:
    for name in FORMATS:
        _, accept = Image.OPEN[name.upper()]
        if accept and accept(raw[:16]) is True:
            return name
    raise InvalidImage(f"not a supported image ({', '.join(FORMATS)})" if raw else "empty: the image has no bytes")


def _open(reader: BoundedReader, raw: bytes, name: str) -> Image.Image:
    try:
        return Image.open(reader, formats=(name.upper(),))
    except UnidentifiedImageError:
        if name == "TIFF":
            raise InvalidImage(f"not a supported image ({describe_tiff(raw)})") from None
        raise


def _load(image: Image.Image, raw: bytes) -> Image.Image:
    """The first frame; of WebP and AVIF without what Pillow holds of it at once, up to five copies."""
    if image.format == "BMP":
        return load_bmp(image)
    if image.format == "PNG":
        return load_png(image, raw)
    if image.format == "GIF":
        return _load_gif(image, raw)
    if image.format not in {"WEBP", "AVIF"}:
        image.load()
        return image
    decoder = vars(image).pop("_decoder")
    if image.format == "AVIF":
        with _ONE_AVIF:
            frame = decoder.get_frame(0)
    else:
        frame = decoder.get_next()
    if frame is None:
        raise InvalidImage("corrupt WebP: its first frame can not be decoded")
    del decoder  # with its canvases
    mode = getattr(image, "rawmode", image.mode)  # a WebP's may be RGBX, then without transparency
    if image.format == "WEBP" and is_animated(raw):
        mode = "RGBA"  # its first frame may leave some of the canvas free
    return Image.frombuffer(mode, image.size, frame[0], "raw", mode, 0, 1)


def _load_gif(image: Image.Image, raw: bytes) -> Image.Image:
    """The first frame on white where it leaves some of the canvas free, as browsers show it on a white page."""
    opened = vars(image)
    frame, end = opened["tile"][0].extents, opened["tile"][0].offset
    for _ in range(_MOST_GIF_BLOCKS):
        if end >= len(raw) or not raw[end]:
            break
        end += 1 + raw[end]
    else:
        raise InvalidImage("corrupt GIF: too many blocks")
    opened["fp"] = BoundedReader(raw[:end])  # else Pillow takes the next frame for pixels that this one lacks
    image.load()
    if frame == (0, 0, *image.size):
        return image
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(opaque(image.crop(frame)), frame[:2])
    return canvas


def _orientation(exif: bytes) -> int:
    """1 to 8; 1 where there is none or the block is broken, as browsers do."""
    with suppress(struct.error, TypeError, InvalidImage):  # TypeError: a PNG's text chunk named "exif" is no bytes
        tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
        for *entry, value in tags(tiff):
            if tuple(entry) == _ORIENTATION:
                turn = int.from_bytes(value[:2], "little" if tiff[:2] == b"II" else "big")
                return turn if turn in range(1, 9) else 1
    return 1


def _turned(size: tuple[int, int], turn: int) -> tuple[int, int]:
    return size[::-1] if turn in _SIDEWAYS else size


def _reduce(image: Image.Image, turn: int, geometry: Geometry, least: int, most: int) -> int:
    """Has a JPEG decoded at 1/1, 1/2, 1/4 or 1/8 of its sides, at least and at most so much; returns which.

    libjpeg then computes means of so many pixels squared straight from the coefficients. They are resampled as the
    pixels would be, so the crop must still hold enough of them for the filter.
    """
    left, top, right, bottom = crop_box(*_turned(image.size, turn), geometry)
    held = min((right - left) / geometry.width, (bottom - top) / geometry.height)
    reduction = max(least, next((r for r in (8, 4, 2) if r <= most and held >= _MARGIN * r), 1))
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    return reduction


def _source_box(box: Box, size: tuple[int, int], turn: int) -> Box:
    """Where `box` of the upright picture lies in the picture as it is stored."""
    left, top, right, bottom = (box[1], box[0], box[3], box[2]) if turn in _SIDEWAYS else box
    if turn in _MIRRORED:
        left, right = size[0] - right, size[0] - left
    if turn in _UPSIDE_DOWN:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _fit(picture: Image.Image, box: Box, turn: int, geometry: Geometry, grey: Grey | None) -> NDArray[np.uint8]:
    """Resizes what `box` holds, and only then turns it and spreads grey to RGB: there are far fewer pixels then."""
    size = _turned((geometry.width, geometry.height), turn)
    if grey or picture.mode not in {"RGB", "RGBX", "L"} or picture.has_transparency_data:
        picture, box = visible(picture, box, size, Image.Resampling[geometry.interpolation.upper()], grey)
    pixels = resample(picture, box, size, geometry.interpolation)
    pixels = pixels[:: -1 if turn in _UPSIDE_DOWN else 1, :: -1 if turn in _MIRRORED else 1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if turn in _SIDEWAYS else pixels)
