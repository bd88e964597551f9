"""Pictures of any mode as people see them: transparency on white, deep grey on its scale, colours in RGB."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from service.images.geometry import Box

_STRIP_PIXELS = 2**19  # of a larger picture, what is converted at a time
_LAB_TO_RGB = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def visible(
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
