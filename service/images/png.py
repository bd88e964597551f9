"""PNGs, their transparent colour taken for what the standard says."""

from typing import Any

import numpy as np
from PIL import Image

from service.images.limits import BoundedReader

_FEW_BITS = {"L;2": 2, "L;4": 4}  # Pillow's raw mode: bits of a grey value
_DEEP, _DEEP_LOW = "RGB;16B", "RGB;16L"  # of 16-bit colours Pillow keeps the high bytes, or so the low ones
_STRIP_PIXELS = 2**19


def load_png(image: Image.Image, raw: bytes) -> Image.Image:
    """The pixels of an open PNG; what comes behind them is not read, so it may be missing.

    Pillow compares a transparent colour with what it has made of the pixels: greys of 2 and 4 bits are spread over 8
    by then, and colours of 16 bits have lost 8. The first is set right, and in the second what is transparent is
    painted white.
    """
    raw_mode, key = vars(image)["tile"][0].args, image.info.get("transparency")
    _load(image)
    if raw_mode in _FEW_BITS and isinstance(key, int):
        most = 2 ** _FEW_BITS[raw_mode] - 1
        image.info["transparency"] = (key & most) * (255 // most)
    elif raw_mode == _DEEP and isinstance(key, tuple):
        with Image.open(BoundedReader(raw), formats=("PNG",)) as low:
            opened = vars(low)
            opened["tile"] = [opened["tile"][0]._replace(args=_DEEP_LOW)]
            _load(low)
            _paint(image, low, np.array(key))
        del image.info["transparency"]
    return image


def _load(image: Image.Image) -> None:
    vars(image)["load_end"] = lambda: None
    image.load()


def _paint(high: Image.Image, low: Image.Image, key: Any) -> None:  # noqa: ANN401  numpy's integers
    rows = max(1, _STRIP_PIXELS // high.width)
    for y in range(0, high.height, rows):
        box = (0, y, high.width, min(y + rows, high.height))
        above, below = (np.asarray(image.crop(box)) for image in (high, low))
        found = ((above == key >> 8) & (below == key & 255)).all(axis=2)
        high.paste("white", box, Image.fromarray(found))
