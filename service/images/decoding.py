"""Bytes of an image -> the model's uint8 input, which shows the image as people see it.

EXIF orientation is applied, transparency lies on white, of several frames the first counts, deep grey keeps its range;
ICC profiles and gamma are ignored, as in the models' training. Only some formats are read, headers are bounded, and
all errors are the service's own.
"""

import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from service.errors import InvalidImage
from service.images.bmp import load_bmp
from service.images.geometry import Box, crop_box
from service.images.geometry import Geometry as Geometry  # noqa: PLC0414  a parameter of `decode`
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
_MOST_GIF_BLOCKS = 2**17  # of up to 255 bytes, in the first frame: 33 MB; walking them takes 0.06 s
# An AVIF may hold a larger frame than its header says, up to libavif's own limit of 268 megapixels, which costs a
# gigabyte and can't be known beforehand: one at a time, so that it is one gigabyte.
_ONE_AVIF = threading.Lock()

Image.init()  # all plugins now, not in the first request's thread
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the thread pool already has one thread per core
# Pillow reports odd metadata by `warnings`, which nobody would read here, and `catch_warnings` is not thread-safe.
for _module in (Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin):
    vars(_module)["warnings"] = SimpleNamespace(warn=lambda *_args, **_kwargs: None)


@dataclass(frozen=True, slots=True)
class Decoded:
    """The model's input, C-contiguous (height, width, 3), and the size of the upright source image."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


class _Source(NamedTuple):
    """An image as its file stores it, at 1/`reduction` of its sides, and the size of the whole of it.

    `orientation` is EXIF's, `grey` the meaning of deep grey values.
    """

    image: Image.Image
    size: tuple[int, int]
    orientation: int = 1
    reduction: int = 1
    grey: Grey | None = None


def decode(
    data: bytes | bytearray | memoryview, geometry: Geometry, *, max_pixels: int, scaled_jpeg: bool = True
) -> Decoded:
    """The image in `data`, upright, in RGB, resized and centre-cropped to `geometry`.

    A JPEG that is far larger than the model's input is decoded at a half, a quarter or an eighth of its sides, unless
    `scaled_jpeg` is off. The size in the result is that of the whole image.

    Raises:
        InvalidImage: it is empty, in no supported format, truncated or corrupt.
        ImageTooLarge: it has more than `max_pixels` pixels, or its decoding takes more than 9 bytes for each of them;
            nothing was decoded.
    """
    name = _format(raw := bytes(data))
    with map_errors(name, max_pixels):
        check_blocks(raw, name)
        raw = without_cut_chunk(raw) if name == "WebP" else raw
        with _open(reader := BoundedReader(raw), raw, name) as file:
            size = check_size(file, max_pixels)
            if name == "TIFF":
                source = _load_tiff(file, raw, max_pixels)
            elif name == "JPEG":
                source = _load_jpeg(file, raw, reader.tell(), geometry, 8 if scaled_jpeg else 1)
            else:
                grey, orientation = _SIXTEEN if file.mode[0] == "I" else None, _orientation(file)
                source = _Source(_load(file, raw), size, orientation, grey=grey)
            return Decoded(_fit(source, geometry), *_turned(source.size, source.orientation))


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


def _orientation(file: Image.Image) -> int:
    """1 to 8, from EXIF; 1 where there is none or the block is broken, as in browsers."""
    exif = file.info.get("exif", b"")
    with suppress(struct.error, TypeError, InvalidImage):  # TypeError: a PNG's text chunk named "exif" is no bytes
        tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
        for *entry, value in tags(tiff):
            if tuple(entry) == _ORIENTATION:
                orientation = int.from_bytes(value[:2], "little" if tiff[:2] == b"II" else "big")
                return orientation if orientation in range(1, 9) else 1
    return 1


def _load_tiff(file: Image.Image, raw: bytes, max_pixels: int) -> _Source:
    grey = prepare_tiff(file, raw, max_pixels)
    file.load()  # which turns it upright
    return _Source(file, file.size, grey=grey)


def _load_jpeg(file: Image.Image, raw: bytes, header_bytes: int, geometry: Geometry, most: int) -> _Source:
    """A JPEG reduced to 1/1, 1/2, 1/4 or 1/8 of its sides: by `most` at the most, by as much as the crop allows.

    libjpeg computes means of so many pixels squared straight from the coefficients. They are resampled as the pixels
    would be, so the crop must still hold enough of them for the filter.
    """
    size, orientation = file.size, _orientation(file)
    reduction = check_scans(file, raw, header_bytes)
    check_complete(raw)
    left, top, right, bottom = crop_box(*_turned(size, orientation), geometry)
    pixels = min((right - left) / geometry.width, (bottom - top) / geometry.height)
    reduction = max(reduction, next((r for r in (8, 4, 2) if r <= most and pixels >= _MARGIN * r), 1))
    if reduction > 1:
        file.draft(None, (file.width // reduction, file.height // reduction))
    return _Source(load_jpeg(file, ended(raw), reduction), size, orientation, reduction)


def _load(file: Image.Image, raw: bytes) -> Image.Image:
    """The first frame; of WebP and AVIF without the copies that Pillow keeps, up to five."""
    if file.format == "BMP":
        return load_bmp(file)
    if file.format == "PNG":
        return load_png(file, raw)
    if file.format == "GIF":
        return _load_gif(file, raw)
    if file.format not in {"WEBP", "AVIF"}:
        file.load()
        return file
    decoder = vars(file).pop("_decoder")
    if file.format == "AVIF":
        with _ONE_AVIF:
            frame = decoder.get_frame(0)
    else:
        frame = decoder.get_next()
    if frame is None:
        raise InvalidImage("corrupt WebP: its first frame can not be decoded")
    del decoder  # with its canvases
    mode = getattr(file, "rawmode", file.mode)  # a WebP's may be RGBX, then without transparency
    if file.format == "WEBP" and is_animated(raw):
        mode = "RGBA"  # its first frame may not cover the canvas
    return Image.frombuffer(mode, file.size, frame[0], "raw", mode, 0, 1)


def _load_gif(file: Image.Image, raw: bytes) -> Image.Image:
    """The first frame, on white where it does not cover the canvas, as browsers show it on a white page."""
    opened = vars(file)
    frame, end = opened["tile"][0].extents, opened["tile"][0].offset
    for _ in range(_MOST_GIF_BLOCKS):
        if end >= len(raw) or not raw[end]:
            break
        end += 1 + raw[end]
    else:
        raise InvalidImage("corrupt GIF: too many blocks")
    opened["fp"] = BoundedReader(raw[:end])  # else Pillow takes the next frame for pixels that this one lacks
    file.load()
    if frame == (0, 0, *file.size):
        return file
    canvas = Image.new("RGB", file.size, "white")
    canvas.paste(opaque(file.crop(frame)), frame[:2])
    return canvas


def _fit(source: _Source, geometry: Geometry) -> NDArray[np.uint8]:
    """Resize the source's crop, and only then turn it and spread grey to RGB: by then there are far fewer pixels."""
    image, (width, height), orientation, reduction, grey = source
    left, top, right, bottom = crop_box(*_turned(source.size, orientation), geometry)
    if orientation in _SIDEWAYS:
        left, top, right, bottom = top, left, bottom, right
    if orientation in _MIRRORED:
        left, right = width - right, width - left
    if orientation in _UPSIDE_DOWN:
        top, bottom = height - bottom, height - top
    # However odd sizes are rounded up, a pixel of the reduced image covers as many source pixels.
    box: Box = (left / reduction, top / reduction, right / reduction, bottom / reduction)
    size = _turned((geometry.width, geometry.height), orientation)
    if grey or image.mode not in {"RGB", "RGBX", "L"} or image.has_transparency_data:
        image, box = visible(image, box, size, Image.Resampling[geometry.interpolation.upper()], grey)
    pixels = resample(image, box, size, geometry.interpolation)
    pixels = pixels[:: -1 if orientation in _UPSIDE_DOWN else 1, :: -1 if orientation in _MIRRORED else 1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if orientation in _SIDEWAYS else pixels)


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation in _SIDEWAYS else size
