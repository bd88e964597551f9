"""Resamples a box of an image to the model's input: by torch's vectorised kernel, or by Pillow's, which it copies.

torch's is Pillow's algorithm, antialiased and in two passes, with AVX2 and 16-bit weights: four times as fast and
within 2 levels of 255. Pillow takes the rest: other processors, large images, grey, enlarging, boxes off the grid.
"""

from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from service.images.geometry import Box, Interpolation

VECTORISED = torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
# torch needs the pixels as an array, 3 bytes each and twice for a moment; Pillow needs no copy of an image.
_MOST_PIXELS = 2**21
_OFF_GRID = 1e-4  # pixels of the target


def resample(image: Image.Image, box: Box, size: tuple[int, int], interpolation: Interpolation) -> NDArray[np.uint8]:
    """The `box` of an RGB or L image, resized to `size` (width, height): uint8 (height, width, 3), maybe a view."""
    unchanged = image.size == size and box == (0, 0, *size)
    if VECTORISED and not unchanged and image.mode == "RGB" and image.width * image.height <= _MOST_PIXELS:
        pixels = _by_torch(image, box, size, interpolation)
        if pixels is not None:
            return pixels
    if not unchanged:
        image = image.resize(size, Image.Resampling[interpolation.upper()], box=box)
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
