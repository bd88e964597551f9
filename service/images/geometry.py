"""How an image is resized and cropped to the model's input. Cards need it, so it must not import torch."""

from dataclasses import dataclass
from math import floor
from typing import Literal, NamedTuple

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "area"]
Resize = Literal["shorter_side_crop", "stretch", "letterbox", "center_crop", "none"]
Kernel = Literal["torchvision", "opencv"]
Rounding = Literal["floor", "nearest"]
Fill = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom; in pixels
_BLACK: Fill = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The model's input size, and how an image is brought to it.

    `shorter_side_crop` resizes the image, its aspect ratio kept, until it covers both sides divided by `crop`, and
    crops the centre. `stretch` resizes it to height x width, whatever its aspect ratio. `letterbox` resizes it, its
    aspect ratio kept, until it just fits, and puts it into the middle of the colour `fill`. `center_crop` crops the
    centre without resizing, of a smaller image on black. `none` takes only images of that size. `crop` is 1 in all but
    the first.

    The kernel `torchvision` with `antialias` is Pillow's; without it is torch's own, on tensors. OpenCV never
    antialiases, but its `area` averages.
    """

    height: int
    width: int
    crop: float
    interpolation: Interpolation
    resize: Resize = "shorter_side_crop"
    rounding: Rounding = "floor"
    kernel: Kernel = "torchvision"
    antialias: bool = True
    fill: Fill = _BLACK

    @property
    def filtered(self) -> bool:
        """Whether each pixel of the input is a smooth mean of all those that it covers, as Pillow's filters make it.

        If not, it depends on where single pixels lie in the upright image, so no reduced image will do for it.
        """
        resized = self.resize not in {"center_crop", "none"}
        return resized and self.antialias and self.interpolation in {"bilinear", "bicubic", "lanczos"}

    def resized(self, side: int) -> int:
        """The side of which the centre crop keeps `side` pixels: side / crop in double precision, then rounded.

        `floor` is the rule of timm (`timm.data.transforms_factory`) and, with a crop of 0.875, of the authors' release
        (`int(256 / 224 * side)`); `nearest` is lucid's, and that of cards without `format`. Both in Python's sense.
        """
        return floor(side / self.crop) if self.rounding == "floor" else round(side / self.crop)


class Placement(NamedTuple):
    """Where an upright image goes: pairs are across and down.

    Its `box` has become `size` when the whole image is resized to `whole`, of which `size` begins at `start`. In the
    model's input it begins at `at`.
    """

    box: Box
    size: tuple[int, int]
    whole: tuple[int, int]
    start: tuple[int, int] = (0, 0)
    at: tuple[int, int] = (0, 0)


def place(width: int, height: int, geometry: Geometry) -> Placement:
    """Where an upright image of this size goes in the model's input. `none` places it as `center_crop` does."""
    target = geometry.width, geometry.height
    if geometry.resize == "stretch":
        return Placement((0, 0, width, height), target, target)
    if geometry.resize == "letterbox":
        return _letterboxed(width, height, geometry)
    across, down = (width, height) if geometry.resize in {"center_crop", "none"} else _resized(width, height, geometry)
    # torchvision's CenterCrop: of an odd number of pixels more, half is rounded to even; of fewer, it is rounded down.
    left, top = max(0, round((across - target[0]) / 2)), max(0, round((down - target[1]) / 2))
    size = min(across, target[0]), min(down, target[1])
    right, bottom, x, y = left + size[0], top + size[1], width / across, height / down
    box = left * x, top * y, min(right * x, width), min(bottom * y, height)
    at = max(0, target[0] - across) // 2, max(0, target[1] - down) // 2
    return Placement(box, size, (across, down), (left, top), at)


def crop_box(width: int, height: int, geometry: Geometry) -> Box:
    """The region of an upright image, in its own pixels, that becomes the model's input."""
    return place(width, height, geometry).box


def region(width: int, height: int, geometry: Geometry) -> Box:
    """The rectangle of an upright image of this size, in its own pixels, that the whole of the model's input shows.

    It exceeds the image where the input has a border: by a letterbox, or around a small image that is not resized.
    """
    (left, top, right, bottom), (across, down), _, _, at = place(width, height, geometry)
    x, y = (right - left) / across, (bottom - top) / down  # pixels of the image in one of the input
    left, top = left - at[0] * x, top - at[1] * y
    return left, top, left + geometry.width * x, top + geometry.height * y


def _letterboxed(width: int, height: int, geometry: Geometry) -> Placement:
    """As Ultralytics' `LetterBox`, and as albumentations' `LongestMaxSize` and `PadIfNeeded`.

    Both round the sides to the nearest, and of an odd number of pixels around put the greater half below and right.
    """
    ratio = min(geometry.height / height, geometry.width / width)
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    at = (geometry.width - size[0]) // 2, (geometry.height - size[1]) // 2
    return Placement((0, 0, width, height), size, size, at=at)


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
