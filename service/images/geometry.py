"""How an image is resized and cropped to the model's input. Cards need it, so it must not import torch."""

from dataclasses import dataclass
from math import floor
from typing import Literal

Interpolation = Literal["bilinear", "bicubic"]
Resize = Literal["shorter_side_crop", "stretch"]
Rounding = Literal["floor", "nearest"]
Box = tuple[float, float, float, float]  # left, top, right, bottom; in pixels


@dataclass(frozen=True, slots=True)
class Geometry:
    """The model's input size, and how an image is brought to it.

    `shorter_side_crop` resizes the image, its aspect ratio kept, until it covers both sides divided by `crop`, and
    crops the centre. `stretch` resizes it to height x width, whatever its aspect ratio; `crop` is 1 then.
    """

    height: int
    width: int
    crop: float
    interpolation: Interpolation
    resize: Resize = "shorter_side_crop"
    rounding: Rounding = "floor"

    def resized(self, side: int) -> int:
        """The side of which the centre crop keeps `side` pixels: side / crop in double precision, then rounded.

        `floor` is the rule of timm (`timm.data.transforms_factory`) and, with a crop of 0.875, of the authors' release
        (`int(256 / 224 * side)`); `nearest` is lucid's, and that of cards without `format`. Both in Python's sense.
        """
        return floor(side / self.crop) if self.rounding == "floor" else round(side / self.crop)


def crop_box(width: int, height: int, geometry: Geometry) -> Box:
    """The region of an upright image, in its own pixels, that becomes the model's input."""
    if geometry.resize == "stretch":
        return 0, 0, width, height
    across, down = _resized(width, height, geometry)
    left, top = round((across - geometry.width) / 2), round((down - geometry.height) / 2)
    right, bottom, x, y = left + geometry.width, top + geometry.height, width / across, height / down
    return left * x, top * y, min(right * x, width), min(bottom * y, height)


def _resized(width: int, height: int, geometry: Geometry) -> tuple[int, int]:
    """The size of the resized image before it is cropped: (width, height).

    A square is covered as by torchvision's `Resize(side)`, which rounds the longer side down; another rectangle as by
    timm's `ResizeKeepRatio`, which rounds both to the nearest, or as older cards did, which rounded down.
    """
    across, down = geometry.resized(geometry.width), geometry.resized(geometry.height)
    if across == down or geometry.rounding == "nearest":
        return max(across, down * width // height), max(down, across * height // width)
    ratio = min(height / down, width / across)
    return round(width / ratio), round(height / ratio)
