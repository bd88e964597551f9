"""From a decoded image of any mode to the model's input: visible as people see it, and resampled.

Transparency lies on white, deep grey is on its scale, colours are RGB. torch's resampling kernel is Pillow's algorithm,
antialiased and in two passes, with AVX2 and 16-bit weights: four times as fast and within 2 levels of 255. Pillow takes
the rest: other processors, large images, grey, enlarging, boxes off the grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms

from service.errors import InvalidImage
from service.images.geometry import Box, Interpolation

VECTORISED = torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
# torch needs the pixels as an array, 3 bytes each and twice for a moment; Pillow needs no copy of an image.
_MOST_PIXELS = 2**21
_OFF_GRID = 1e-4  # pixels of the target
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

    def values(self, image: Image.Image) -> NDArray[Any]:
        """Those of `image`, in the type that they had in the file."""
        values = np.asarray(image)
        return values.view(self.stored) if self.stored else values

    def scale(self, image: Image.Image) -> tuple[float, float]:
        """The values that become black and white.

        Values that fill a scale keep it: from 0 to the first of 1 (floats only), 255 and 65535 that they don't exceed,
        if they exceed half of it. All others are stretched from the lowest to the highest; if these are equal, they are
        on that first scale, filled or not. NaN and infinities do not count.
        """
        if self.white:
            return 0, self.white
        ranges = []
        for box in strips(image):
            values = self.values(image.crop(box))
            values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
            if values.size:
                ranges.append((float(values.min()), float(values.max())))
        low, high = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else (0.0, 0.0)
        scale = next((s for s in ((1, 255, 65535) if image.mode == "F" else (255, 65535)) if high <= s), None)
        if self.rounded and 0 < high - low < max(abs(low), abs(high)) / _DISTINCT:
            raise InvalidImage(
                f"not a supported image (TIFF of 64-bit numbers from {low:g} to {high:g}, which 32 bits can't tell "
                "apart)"
            )
        if low == high and low > 0:
            return 0, scale or high
        return (0, scale) if scale and low >= 0 and high > scale / 2 else (low, high)

    def eight_bits(self, strip: Image.Image, low: float, high: float) -> Image.Image:
        """Mode L, with `low` as black and `high` as white. NaN is zero; values beyond are black or white."""
        values = self.values(strip)
        if self.white == _SIXTEEN_BITS:
            pixels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        else:
            with np.errstate(invalid="ignore"):  # numpy warns of some NaNs
                numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
            # Halved, since a float64 can't hold the difference of its largest and its lowest value.
            span = high / 2 - low / 2 or 1.0
            pixels = np.rint(255 * np.clip((numbers / 2 - low / 2) / span, 0, 1)).astype(np.uint8)
        if self.inverted:
            pixels = 255 - pixels
        if "transparency" in strip.info:  # a PNG's transparent value, on white
            pixels[values == strip.info["transparency"]] = 255
        return Image.fromarray(pixels)


def strips(image: Image.Image, above: int = 0, below: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of few pixels that make up the rows from `above` to `below` of `image`, all by default."""
    rows, end = max(1, _STRIP_PIXELS // image.width), image.height if below is None else below
    for y in range(above, end, rows):
        yield 0, y, image.width, min(y + rows, end)


def opaque(image: Image.Image) -> Image.Image:
    """`image` in mode RGB or L, with transparent parts on white."""
    if image.has_transparency_data:
        # White is the background of the pages, documents and product photos that most such images are made for.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        (canvas := Image.new("RGB", image.size, "white")).paste(image, mask=image)
        return canvas
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _LAB_TO_RGB) or image
    return image if image.mode in {"RGB", "L"} else image.convert("L" if image.mode == "1" else "RGB")


def _visible(
    image: Image.Image, box: Box, size: tuple[int, int], filtered: Image.Resampling, grey: Grey | None
) -> tuple[Image.Image, Box]:
    """The image as people see it, in mode RGB or L, and where `box` lies in it.

    A large one is converted in strips, each of which is at once resized to the target's width, so that there is no
    second image of its size. Pillow resizes in the same two passes, so nothing else changes.
    """
    scale = grey.scale(image) if grey else (0.0, 0.0)
    if image.width * image.height <= _STRIP_PIXELS:
        return grey.eight_bits(image, *scale) if grey else opaque(image), box
    left, top, right, bottom = box
    reach = 2 + 3 * max(1, (bottom - top) / size[1])  # of the widest filter, in rows, rounded up
    above, below = max(0, int(top - reach)), min(image.height, int(bottom + reach))
    joined = None
    for part in strips(image, above, below):
        strip = grey.eight_bits(image.crop(part), *scale) if grey else opaque(image.crop(part))
        joined = joined or Image.new(strip.mode, (size[0], below - above))
        narrow = strip.resize((size[0], strip.height), filtered, box=(left, 0, right, strip.height))
        joined.paste(narrow, (0, part[1] - above))
    assert joined is not None  # noqa: S101  a box has rows
    return joined, (0, top - above, size[0], bottom - above)


def resample(
    image: Image.Image, box: Box, size: tuple[int, int], interpolation: Interpolation, grey: Grey | None = None
) -> NDArray[np.uint8]:
    """The `box` of an image, resized to `size` (width, height): uint8 (height, width, 3), maybe a view."""
    filtered = Image.Resampling[interpolation.upper()]
    if grey or image.mode not in {"RGB", "RGBX", "L"} or image.has_transparency_data:
        image, box = _visible(image, box, size, filtered, grey)
    unchanged = image.size == size and box == (0, 0, *size)
    if (
        VECTORISED
        and not unchanged
        and interpolation != "lanczos"
        and image.mode == "RGB"
        and image.width * image.height <= _MOST_PIXELS
    ):
        pixels = _by_torch(image, box, size, interpolation)
        if pixels is not None:
            return pixels
    if not unchanged:
        image = image.resize(size, filtered, box=box)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _by_torch(
    image: Image.Image, box: Box, size: tuple[int, int], interpolation: Interpolation
) -> NDArray[np.uint8] | None:
    """The same; None where a side grows, or `box` does not begin at a whole pixel of the scaled image.

    The kernel has no box: the pixels left of the box and above it are resampled too, and dropped.
    """
    x, y = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]  # source pixels for one of the target
    left, top = round(box[0] / x), round(box[1] / y)
    # A side that grows might by chance be as long as it was, and the kernel would do nothing.
    if min(x, y) < 1 or max(abs(box[0] / x - left), abs(box[1] / y - top)) > _OFF_GRID:
        return None
    across, down = left + size[0], top + size[1]
    right, bottom = ceil(box[2] + 2 * x) + 1, ceil(box[3] + 2 * y) + 1  # as far as the filters reach
    source = torch.from_numpy(np.asarray(image)[np.newaxis, :bottom, :right].copy()).permute(0, 3, 1, 2)
    target = torch.empty((1, 3, down, across), dtype=torch.uint8, memory_format=torch.channels_last)
    # `torch.nn.functional.interpolate` would write its result in planes, which takes as long to undo as to make.
    kernel = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa").out
    kernel(source, [down, across], False, 1 / y, 1 / x, out=target)  # noqa: FBT003 - a corner is a pixel's, not its centre
    pixels: NDArray[np.uint8] = target[0, :, top:, left:].permute(1, 2, 0).numpy()
    return pixels
