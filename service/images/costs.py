"""What decoding an image costs, from its header alone: pixels, as the limit counts them, and bytes at the peak.

The bytes are upper bounds of what `tests/service/images/test_costs.py` measures in a process of its own.
"""

from dataclasses import dataclass

from PIL import Image
from PIL.ImageFile import _Tile

from service.images.geometry import Box
from service.images.limits import codec_bytes, counted_jpeg_pixels
from service.images.tiff import held_bytes

LARGE_BYTES = 16_000_000  # 4 megapixels in colour
_STRIP_BYTES = 16_000_000  # conversion of a strip of a large image to what people see, in the mode that takes most
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # of Pillow's images; 4 in other modes


@dataclass(frozen=True, slots=True)
class Cost:
    """What decoding takes: `pixels`, of a JPEG those that count, and `bytes` of memory beside the file, at most."""

    pixels: int
    bytes: int

    @property
    def large(self) -> bool:
        """Whether so many bytes must be free before it begins; what threads keep ready is enough for smaller ones."""
        return self.bytes > LARGE_BYTES


def cost_of(
    image: Image.Image,
    reduction: int,
    box: Box,
    target: tuple[int, int],
    *,
    several_scans: bool = False,
    filtered: bool = True,
) -> Cost:
    """The cost of an open image, whose `box` is resized to `target` (width, height), both as the file lies.

    A JPEG is read at 1/`reduction` of its sides; `several_scans` says that libjpeg keeps its coefficients. `filtered`
    is `Geometry.filtered`.
    """
    pixels = image.width * image.height
    if image.format in {"JPEG", "MPO"}:
        held = several_scans * _coefficients(image) + 4 * -(-pixels // reduction**2)
        pixels = counted_jpeg_pixels(pixels, reduction, several_scans=several_scans)
    elif image.format == "TIFF":
        held = held_bytes(image)
    else:
        held = (codec_bytes(image) or _pixel_bytes(image)) * pixels
    if not filtered:  # float32 sums of the target, and what a strip adds to them
        return Cost(pixels, int(held + 48 * target[0] * target[1] + 2 * _STRIP_BYTES * (held > _STRIP_BYTES)))
    # Pillow resizes rows to the target's width before columns; where it can't take the image itself, in two steps.
    rows = (box[3] - box[1]) / reduction
    return Cost(pixels, int(held + 8 * target[0] * rows + _STRIP_BYTES * (held > _STRIP_BYTES)))


def _coefficients(image: Image.Image) -> int:
    """The bytes of all coefficients of an open JPEG: two for each pixel of each component, in blocks of 8x8."""
    layers = [(across, down) for _, across, down, _ in vars(image)["layer"]]
    most_across, most_down = (max(factors, default=1) or 1 for factors in zip(*layers, strict=True))
    across, down = -(-image.width // (8 * most_across)), -(-image.height // (8 * most_down))
    return int(2 * 64 * across * down * sum(h * v for h, v in layers))


def _pixel_bytes(image: Image.Image) -> int:
    """For each pixel of an open PNG, GIF or BMP, while its loader in `service.images.formats` works."""
    pixel: int = _PIXEL_BYTES.get(image.mode, 4)
    tile: _Tile = vars(image)["tile"][0]
    if image.format == "PNG" and tile.args == "RGB;16B" and "transparency" in image.info:
        return 2 * pixel
    if image.format == "GIF" and tile.extents != (0, 0, *image.size):
        return 14 * pixel  # the canvas twice, and of a frame that may cover it nearly: cut out, in RGBA and on white
    if image.format == "BMP":  # the indices that were compressed, twice; of alpha that says nothing, a copy without
        return pixel + 2 * (tile.codec_name == "bmp_rle") + (5 if image.mode in {"RGB", "RGBA"} else 0)
    return pixel
