"""Images of any mode as people see them: transparency on white, deep grey on its scale, colours in RGB."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from service.errors import InvalidImage
from service.images.geometry import Box

Scale = tuple[float, float]  # the values that are black and white

_SIXTEEN_BITS = 65_535
_DISTINCT = 2**15  # float32 holds at least 256 steps in a range of 1/2**15 of its values' magnitude
_STRIP_PIXELS = 2**19  # of a larger image, what is converted at a time
_LAB_TO_RGB = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


@dataclass(frozen=True, slots=True)
class Grey:
    """The meaning of the values of a deep grey image.

    `white` is their brightest value, None where the values themselves decide; `stored` their type where it isn't the
    mode's; `inverted`: the brightest is black; `rounded`: they were float64 and are float32.
    """

    white: int | None
    stored: np.dtype[Any] | None = None
    inverted: bool = False
    rounded: bool = False


def visible(
    image: Image.Image, box: Box, size: tuple[int, int], filtered: Image.Resampling, grey: Grey | None = None
) -> tuple[Image.Image, Box]:
    """The image as people see it, in mode RGB or L, and where `box` lies in it.

    A large one is converted in strips, each of which is at once resized to the target's width, so that there is no
    second image of its size. Pillow resizes in the same two passes, so nothing else changes.
    """
    scale = _scale(image, grey) if grey else None
    if image.width * image.height <= _STRIP_PIXELS:
        return _converted(image, grey, scale), box
    left, top, right, bottom = box
    reach = 2 + 2 * max(1, (bottom - top) / size[1])  # of the filters, in rows, rounded up
    above, below = max(0, int(top - reach)), min(image.height, int(bottom + reach))
    strips = (_converted(strip, grey, scale) for strip in _strips(image, above, below))
    narrow = [strip.resize((size[0], strip.height), filtered, box=(left, 0, right, strip.height)) for strip in strips]
    joined, y = Image.new(narrow[0].mode, (size[0], below - above)), 0
    for strip in narrow:
        joined.paste(strip, (0, y))
        y += strip.height
    return joined, (0, top - above, size[0], bottom - above)


def _strips(image: Image.Image, above: int, below: int) -> Iterator[Image.Image]:
    rows = max(1, _STRIP_PIXELS // image.width)
    for y in range(above, below, rows):
        yield image.crop((0, y, image.width, min(y + rows, below)))


def _converted(strip: Image.Image, grey: Grey | None, scale: Scale | None) -> Image.Image:
    """`strip` in mode RGB or L; `scale` is the whole image's, if it is deep grey."""
    if grey and scale:
        return Image.fromarray(_eight_bits(strip, grey, scale))
    return opaque(strip)


def opaque(strip: Image.Image) -> Image.Image:
    """`strip` in mode RGB or L, with transparent parts on white."""
    if strip.has_transparency_data:
        # White is the background of the pages, documents and product photos that most such images are made for.
        strip = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        (canvas := Image.new("RGB", strip.size, "white")).paste(strip, mask=strip)
        return canvas
    if strip.mode == "LAB":
        return ImageCms.applyTransform(strip, _LAB_TO_RGB) or strip
    return strip if strip.mode in {"RGB", "L"} else strip.convert("L" if strip.mode == "1" else "RGB")


def _values(strip: Image.Image, grey: Grey) -> NDArray[Any]:
    values = np.asarray(strip)
    return values.view(grey.stored) if grey.stored else values


def _scale(image: Image.Image, grey: Grey) -> Scale:
    """The values that become black and white.

    Values that fill a scale keep it: from 0 to the first of 1 (floats only), 255 and 65535 that they don't exceed, if
    they exceed half of it. All others are stretched from the lowest to the highest; if these are equal, they are on
    that first scale, filled or not. NaN and infinities do not count.
    """
    if grey.white:
        return 0, grey.white
    ranges = []
    for strip in _strips(image, 0, image.height):
        values = _values(strip, grey)
        values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if values.size:
            ranges.append((float(values.min()), float(values.max())))
    low, high = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else (0.0, 0.0)
    scale = next((s for s in ((1, 255, 65535) if image.mode == "F" else (255, 65535)) if high <= s), None)
    if grey.rounded and 0 < high - low < max(abs(low), abs(high)) / _DISTINCT:
        raise InvalidImage(
            f"not a supported image (TIFF of 64-bit numbers from {low:g} to {high:g}, which 32 bits can't tell apart)"
        )
    if low == high and low > 0:
        return 0, scale or high
    return (0, scale) if scale and low >= 0 and high > scale / 2 else (low, high)


def _eight_bits(strip: Image.Image, grey: Grey, scale: Scale) -> NDArray[np.uint8]:
    """Deep grey on 0..255. NaN is zero; values outside the scale are black or white."""
    values = _values(strip, grey)
    if grey.white == _SIXTEEN_BITS:
        pixels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    else:
        low, high = scale
        with np.errstate(invalid="ignore"):  # numpy warns of some NaNs
            numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
        # Halved, since a float64 can't hold the difference of its largest and its lowest value.
        pixels = np.rint(255 * np.clip((numbers / 2 - low / 2) / (high / 2 - low / 2 or 1.0), 0, 1)).astype(np.uint8)
    if grey.inverted:
        pixels = 255 - pixels
    if "transparency" in strip.info:  # a PNG's transparent value, on white
        pixels[values == strip.info["transparency"]] = 255
    return pixels
