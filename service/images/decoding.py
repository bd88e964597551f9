"""Bytes of an image -> the model's uint8 input, which shows the image as people see it.

EXIF orientation is applied, transparency lies on white, of several frames the first counts, deep grey keeps its range;
ICC profiles and gamma are ignored, as in the models' training. Only some formats are read, headers are bounded, and
all errors are the service's own.
"""

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from service.errors import ImageTooLarge, InvalidImage
from service.images import camera_raw, formats, jpeg
from service.images.costs import Cost, cost_of
from service.images.geometry import Box, place
from service.images.geometry import Geometry as Geometry  # noqa: PLC0414  a parameter of `decode`
from service.images.kinds import FORMATS as FORMATS  # noqa: PLC0414
from service.images.kinds import HEIF, format_of
from service.images.limits import BoundedReader, check_blocks, check_jpeg_size, check_size, map_errors, tags
from service.images.resampling import Grey, resample
from service.images.sampling import Taps, axes, sample
from service.images.tiff import prepare, refusal

_LOADERS = {
    "PNG": formats.load_png,
    "WebP": formats.load_webp,
    "GIF": formats.load_gif,
    "BMP": formats.load_bmp,
    "AVIF": formats.load_avif,
    "HEIF": formats.load_heif,
}
_ORIENTATION = (0x0112, 3, 1)  # the tag, its type SHORT, one value
# EXIF orientations by what sets them upright: mirrored left-right, top-bottom, and then width and height swapped
_MIRRORED, _UPSIDE_DOWN, _SIDEWAYS = {2, 3, 7, 8}, {3, 4, 6, 7}, {5, 6, 7, 8}
# Pixels on a side that a JPEG of reduced size must still have for each of the model's input; see decision 28
_MARGIN = 2
_SIXTEEN_BITS = 65_535

Image.init()  # all plugins now, not in the first request's thread
if HEIF:
    formats.register_heif()
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


class Reserve(Protocol):
    """Waits until what decoding costs may be spent, and holds that while its context lasts."""

    def __call__(self, cost: Cost, /) -> AbstractContextManager[object]: ...  # noqa: D102


def decode(
    data: bytes | bytearray | memoryview,
    geometry: Geometry,
    *,
    max_pixels: int,
    scaled_jpeg: bool = True,
    reserve: Reserve = nullcontext,
) -> Decoded:
    """The image in `data`, upright, in RGB, resized and centre-cropped to `geometry`.

    A JPEG that is far larger than the model's input is decoded at a half, a quarter or an eighth of its sides, unless
    `scaled_jpeg` is off. The size in the result is that of the whole image. `reserve` is entered with the cost, known
    from the header, before any pixel is decoded.

    Raises:
        InvalidImage: it is empty, in no supported format, truncated or corrupt.
        ImageTooLarge: it has more than `max_pixels` pixels, of a JPEG those that `counted_jpeg_pixels` counts; or its
            decoding takes more than 9 bytes for each of them, or would need a JPEG of reduced size that `geometry`
            can't use; nothing was decoded.
        ServiceError: what `reserve` raises.
    """
    with (
        _opened(data, geometry, max_pixels=max_pixels, scaled_jpeg=scaled_jpeg) as opened,
        reserve(opened.cost),
    ):
        return _pixels(opened, geometry, max_pixels)


def cost(
    data: bytes | bytearray | memoryview, geometry: Geometry, *, max_pixels: int, scaled_jpeg: bool = True
) -> Cost:
    """What `decode` of the same takes, from the header alone; raises as `decode` where that can't be read."""
    with _opened(data, geometry, max_pixels=max_pixels, scaled_jpeg=scaled_jpeg) as opened:
        return opened.cost


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file of which only the header has been read, and what its pixels will cost."""

    file: Image.Image
    raw: bytes
    name: str
    orientation: int
    reduction: int
    cost: Cost


@contextmanager
def _opened(
    data: bytes | bytearray | memoryview, geometry: Geometry, *, max_pixels: int, scaled_jpeg: bool
) -> Iterator[_Opened]:
    name, turn = format_of(raw := bytes(data)), 1
    if name == "TIFF" and (preview := camera_raw.preview(raw)):
        name, raw, turn = format_of(preview.data), preview.data, preview.orientation
    with map_errors(name, max_pixels):
        check_blocks(raw, name)
        raw = formats.without_cut_chunk(raw) if name == "WebP" else raw
        with _open(BoundedReader(raw), raw, name) as file:
            orientation, reduction, scans = _turn(file, name, raw) or turn, 1, False
            if name == "JPEG":
                if scaled_jpeg and geometry.filtered:
                    reduction = _reduction(_turned(file.size, orientation), geometry)
                scans, pixels = jpeg.check_scans(raw), file.width * file.height
                check_jpeg_size(pixels, reduction, max_pixels, several_scans=scans)
                if scans:
                    jpeg.check_passes(pixels, raw)
                least = jpeg.least_reduction(file, several_scans=scans)
                _check_reduction(file, least, geometry)
                reduction = max(least, reduction)
            else:
                check_size(file, max_pixels)
            if name != "TIFF":  # which may be turned when it is loaded
                _check_unresized(_turned(file.size, orientation), geometry)
            box, target = _stored_crop(file.size, orientation, geometry)
            price = cost_of(file, reduction, box, target, several_scans=scans, filtered=geometry.filtered)
            yield _Opened(file, raw, name, orientation, reduction, price)


def _pixels(opened: _Opened, geometry: Geometry, max_pixels: int) -> Decoded:
    file, raw, orientation, reduction = opened.file, opened.raw, opened.orientation, opened.reduction
    grey, size = None, file.size
    if opened.name == "TIFF":
        grey, image = prepare(file, raw, max_pixels), file
        file.load()  # which turns it upright
        _check_unresized(size := file.size, geometry)
    elif opened.name == "JPEG":
        image = jpeg.load_jpeg(file, raw, reduction)
    else:
        grey = Grey(_SIXTEEN_BITS) if file.mode[0] == "I" else None
        image = _LOADERS[opened.name](file, raw)
    upright = _turned(size, orientation)
    if geometry.filtered:
        (left, top, right, bottom), target = _stored_crop(size, orientation, geometry)
        # However odd sizes are rounded up, a pixel of the reduced image covers as many source pixels.
        box: Box = (left / reduction, top / reduction, right / reduction, bottom / reduction)
        pixels = resample(image, box, target, geometry.interpolation, grey)
    else:
        pixels = sample(image, *_stored_taps(upright, orientation, geometry), grey)
    return Decoded(_placed(_upright(pixels, orientation), upright, geometry), *upright)


def _check_unresized(size: tuple[int, int], geometry: Geometry) -> None:
    """Refuse an upright image of another size than the input's, where the model's card says that none is resized."""
    if geometry.resize == "none" and size != (geometry.width, geometry.height):
        raise InvalidImage(
            f"the image is {size[0]}x{size[1]} and the model takes {geometry.width}x{geometry.height} (width x "
            "height): its card says resize none, so send images of that size"
        )


def _check_reduction(file: Image.Image, least: int, geometry: Geometry) -> None:
    """Refuse a JPEG that memory allows to be read at half its sides only, where single pixels count."""
    if least > 1 and not geometry.filtered:
        raise ImageTooLarge(
            f"a progressive JPEG of {file.width}x{file.height} pixels is read at half its sides, which does not give "
            "what the model's way of resizing (in its card) gives; send it as a baseline JPEG, or smaller"
        )


def _open(reader: BoundedReader, raw: bytes, name: str) -> Image.Image:
    try:
        if name == "JPEG":  # whose pixels Pillow would count as if all were decoded
            return jpeg.open_jpeg(reader)
        return Image.open(reader, formats=(name.upper(),))
    except UnidentifiedImageError:
        if name == "TIFF":
            raise refusal(raw) from None
        raise


def _turn(file: Image.Image, name: str, raw: bytes) -> int:
    """The orientation that is still to be applied: Pillow's TIFF and HEIF decoders apply their own."""
    return (
        0
        if name in {"TIFF", "HEIF"}
        else _orientation(
            formats.late_exif(raw) if name == "PNG" and "exif" not in file.info else file.info.get("exif", b"")
        )
    )


def _orientation(exif: bytes) -> int:
    """1 to 8, from EXIF; 0 where there is none or the block is broken, as in browsers."""
    with suppress(struct.error, TypeError, InvalidImage):  # TypeError: a PNG's text chunk named "exif" is no bytes
        tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
        for *entry, value in tags(tiff):
            if tuple(entry) == _ORIENTATION:
                orientation = int.from_bytes(value[:2], "little" if tiff[:2] == b"II" else "big")
                return orientation if orientation in range(1, 9) else 0
    return 0


def _reduction(size: tuple[int, int], geometry: Geometry) -> int:
    """By how much the sides of an upright JPEG of this size may be reduced: 1, 2, 4 or 8.

    libjpeg computes means of so many pixels squared straight from the coefficients. They are resampled as the pixels
    would be, so the crop must still have enough of them for the filter.
    """
    (left, top, right, bottom), (across, down), *_ = place(*size, geometry)
    pixels = min((right - left) / across, (bottom - top) / down)
    return next((r for r in (8, 4, 2) if pixels >= _MARGIN * r), 1)


def _stored_crop(size: tuple[int, int], orientation: int, geometry: Geometry) -> tuple[Box, tuple[int, int]]:
    """The region that goes into the model's input, in an image of this size as its file stores it, and its size there.

    Both turned as the file is.
    """
    width, height = size
    (left, top, right, bottom), target, *_ = place(*_turned(size, orientation), geometry)
    if orientation in _SIDEWAYS:
        left, top, right, bottom = top, left, bottom, right
    if orientation in _MIRRORED:
        left, right = width - right, width - left
    if orientation in _UPSIDE_DOWN:
        top, bottom = height - bottom, height - top
    return (left, top, right, bottom), _turned(target, orientation)


def _stored_taps(upright: tuple[int, int], orientation: int, geometry: Geometry) -> tuple[Taps, Taps]:
    """Taps across and down in an image as its file stores it, which turned upright has the size `upright`."""
    across, down = axes(upright, place(*upright, geometry), geometry)
    width, height = upright
    if orientation in _SIDEWAYS:
        across, down, width, height = down, across, height, width
    return (
        across.mirrored(width) if orientation in _MIRRORED else across,
        down.mirrored(height) if orientation in _UPSIDE_DOWN else down,
    )


def _placed(pixels: NDArray[np.uint8], size: tuple[int, int], geometry: Geometry) -> NDArray[np.uint8]:
    """`pixels` of an upright image of `size`, in the model's input; what they leave free has the card's colour."""
    if pixels.shape == (geometry.height, geometry.width, 3):
        return pixels
    canvas = np.full((geometry.height, geometry.width, 3), geometry.fill, np.uint8)
    left, top = place(*size, geometry).at
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turned only after resizing: by then there are far fewer pixels."""
    pixels = pixels[:: -1 if orientation in _UPSIDE_DOWN else 1, :: -1 if orientation in _MIRRORED else 1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if orientation in _SIDEWAYS else pixels)


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation in _SIDEWAYS else size
