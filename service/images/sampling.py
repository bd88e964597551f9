"""Resizing that depends on single pixels of the upright image, as torch does it without antialiasing, and OpenCV.

Pillow's `nearest` and `BOX` are among it: where a pixel lies on the border of two, they take it for the left one, so a
mirrored file must not be resized as it lies. Each kernel is a few source pixels and their weights for each pixel of the
target. Sums are float32 and rounded once, where libraries round between the two passes or compute in fixed point.

Sources: Pillow `src/libImaging/{Geometry,Resample}.c`; torch `aten/src/ATen/native/UpSample.h`; OpenCV
`modules/imgproc/src/resize.cpp`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.images.geometry import Geometry, Placement
from service.images.resampling import Grey, opaque, strips

_BICUBIC_A = -0.75  # of torch without antialiasing and OpenCV; Pillow's is -0.5
_HALF = 0.5
_MANY_TAPS = 32  # from here on a product of matrices is faster than a sum
_MOST_NUMBERS = 2**21  # of float32 at a time
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Taps:
    """For each of n pixels of the target, t source pixels along one axis: `index` (t, n) and `weight` (t, n)."""

    index: NDArray[np.int64]
    weight: NDArray[np.float32]

    def mirrored(self, side: int) -> "Taps":
        """The same of the image of `side` pixels mirrored, for the target mirrored."""
        return Taps(side - 1 - self.index[:, ::-1], self.weight[:, ::-1])


@dataclass(frozen=True, slots=True)
class Axis:
    """`count` pixels from `start` on, of `side` source pixels resized to `whole`."""

    side: int
    whole: int
    start: int
    count: int

    @property
    def scale(self) -> float:
        """Source pixels for one of the target."""
        return self.side / self.whole

    @property
    def pixels(self) -> NDArray[np.int64]:
        """Those of the target, by number."""
        return np.arange(self.start, self.start + self.count)


def axes(size: tuple[int, int], placement: Placement, geometry: Geometry) -> tuple[Taps, Taps]:
    """The taps across and down of an upright image of `size` (width, height)."""
    both = [
        Axis(*of_axis)
        for of_axis in zip(size, placement.whole, placement.start, placement.size, strict=True)
    ]  # fmt: skip
    shrinks = all(axis.scale >= 1 for axis in both)
    across, down = (_taps(axis, geometry, shrinks=shrinks) for axis in both)
    return across, down


def _taps(axis: Axis, geometry: Geometry, *, shrinks: bool) -> Taps:
    kind = geometry.interpolation
    if axis.side == axis.whole or geometry.resize in {"center_crop", "none"}:
        return _clamped(axis, axis.pixels[np.newaxis], np.ones((1, axis.count)))
    if kind == "nearest":
        return _clamped(axis, _nearest(axis, geometry)[np.newaxis], np.ones((1, axis.count)))
    if kind == "area":
        if geometry.kernel == "torchvision":
            return _box(axis)
        return _coverage(axis) if shrinks else _enlarged_area(axis)
    centre = (axis.pixels + 0.5) * axis.scale - 0.5
    left = np.floor(centre)
    before, after = {"bilinear": (0, 1), "bicubic": (1, 2), "lanczos": (3, 4)}[kind]
    index = left.astype(np.int64) + np.arange(-before, after + 1)[:, np.newaxis]
    weight = {"bilinear": _linear, "bicubic": _cubic, "lanczos": _lanczos4}[kind](np.abs(centre - index))
    return _clamped(axis, index, weight / weight.sum(axis=0))


def _clamped(axis: Axis, index: NDArray[np.int64], weight: _Floats) -> Taps:
    return Taps(np.clip(index, 0, axis.side - 1), weight.astype(np.float32))


def _nearest(axis: Axis, geometry: Geometry) -> NDArray[np.int64]:
    """In the arithmetic of each library: a product just below a whole number is the pixel before."""
    if geometry.kernel == "opencv":
        place = axis.pixels * (1 / (axis.whole / axis.side))
    elif not geometry.antialias:
        place = axis.pixels.astype(np.float32) * np.float32(axis.scale)
    else:  # Pillow adds them up
        steps = np.full(axis.start + axis.count, axis.scale)
        steps[0] = axis.scale * 0.5
        place = np.cumsum(steps)[axis.start :]
    index: NDArray[np.int64] = np.floor(place).astype(np.int64)
    return index


def _linear(distance: _Floats) -> _Floats:
    return 1 - distance


def _cubic(distance: _Floats) -> _Floats:
    a, x = _BICUBIC_A, distance
    return np.where(x <= 1, ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a)


def _lanczos4(distance: _Floats) -> _Floats:
    weight: _Floats = np.sinc(distance) * np.sinc(distance / 4)
    return weight


def _box(axis: Axis) -> Taps:
    """Pillow's BOX: the mean of all pixels whose centres are in the window, of those on its borders the right one."""
    reach = max(axis.scale, 1.0)
    centre = (axis.pixels + 0.5) * axis.scale
    index = np.floor(centre - reach / 2 + 0.5).astype(np.int64) + np.arange(ceil(reach) + 2)[:, np.newaxis]
    place = (index - centre + 0.5) / reach
    inside = (place > -_HALF) & (place <= _HALF) & (index >= 0) & (index < axis.side)
    weight = inside.astype(np.float64)
    return _clamped(axis, index, weight / weight.sum(axis=0))


def _coverage(axis: Axis) -> Taps:
    """OpenCV's INTER_AREA where neither side grows: each pixel counts by how much of it is in the window."""
    low = axis.pixels * axis.scale
    high = np.minimum(low + axis.scale, axis.side)
    index = np.floor(low).astype(np.int64) + np.arange(ceil(axis.scale) + 1)[:, np.newaxis]
    weight = np.clip(np.minimum(index + 1, high) - np.maximum(index, low), 0, None)
    return _clamped(axis, index, weight / weight.sum(axis=0))


def _enlarged_area(axis: Axis) -> Taps:
    """OpenCV's INTER_AREA where a side grows: linear, but only where two source pixels meet in one of the target."""
    left = np.floor(axis.pixels * axis.scale)
    share = (axis.pixels + 1) - (left + 1) / axis.scale
    share = np.where(share <= 0, 0, share - np.floor(share))
    index = left.astype(np.int64)
    return _clamped(axis, np.stack([index, index + 1]), np.stack([1 - share, share]))


def sample(image: Image.Image, across: Taps, down: Taps, grey: Grey | None = None) -> NDArray[np.uint8]:
    """The weighted sums of pixels of `image`: uint8 (height, width, 3).

    The image is converted to RGB in strips, so that there is no second one of its size.
    """
    target = np.zeros((down.index.shape[1], across.index.shape[1], 3), np.float32)
    for top, pixels in _visible_strips(image, down, across.index.shape[1], grey):
        rows = np.unique(down.index[(down.index >= top) & (down.index < top + len(pixels))])
        if rows.size:
            _add(target, _narrowed(pixels[rows - top], across), rows, down)
    target += _HALF
    return np.clip(target, 0, 255.5, out=target).astype(np.uint8)


def _visible_strips(
    image: Image.Image, down: Taps, width: int, grey: Grey | None
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The first row of each strip that `down` reaches, and its pixels (rows, columns, 3) as people see them."""
    scale = grey.scale(image) if grey else (0.0, 0.0)
    most = max(1, _MOST_NUMBERS // (3 * width))
    for box in strips(image, int(down.index.min()), int(down.index.max()) + 1):
        strip = image if box == (0, 0, *image.size) else image.crop(box)
        strip = grey.eight_bits(strip, *scale) if grey else opaque(strip)
        pixels = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
        for row in range(0, len(pixels), most):
            yield box[1] + row, pixels[row : row + most]


def _narrowed(pixels: NDArray[np.uint8], across: Taps) -> NDArray[np.float32]:
    """(rows, columns, 3) -> (rows, width, 3)."""
    total = np.zeros((len(pixels), across.index.shape[1], 3), np.float32)
    for index, weight in zip(across.index, across.weight, strict=True):
        total += pixels[:, index] * weight[:, np.newaxis]
    return total


def _add(target: NDArray[np.float32], narrow: NDArray[np.float32], rows: NDArray[np.int64], down: Taps) -> None:
    """Add to `target` what `rows` of the source, which are sorted, give to it."""
    reached = np.flatnonzero((down.index.max(axis=0) >= rows[0]) & (down.index.min(axis=0) <= rows[-1]))
    first, last = int(reached[0]), int(reached[-1]) + 1
    index, weight = down.index[:, first:last], down.weight[:, first:last]
    inside = (index >= rows[0]) & (index <= rows[-1])
    place = np.minimum(np.searchsorted(rows, index), len(rows) - 1)
    if len(index) >= _MANY_TAPS:
        product = np.zeros((last - first, len(rows)), np.float32)
        taps, pixels = np.nonzero(inside)
        np.add.at(product, (pixels, place[taps, pixels]), weight[taps, pixels])
        target[first:last] += np.einsum("hn,nwc->hwc", product, narrow)
        return
    for each, share, within in zip(place, weight, inside, strict=True):
        target[first:last][within] += narrow[each[within]] * share[within, np.newaxis, np.newaxis]
