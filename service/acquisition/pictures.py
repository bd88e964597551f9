"""Pictures that show whether a model computes what it should: seeded, so that they are the same everywhere."""

import numpy as np
from numpy.typing import NDArray

from service.execution.reference import synthetic_images

_SHAPES = 4
_BAR = 0.08  # half its height, as a share of the picture's


def reference_images(height: int, width: int) -> NDArray[np.uint8]:
    """Pictures (n, height, width, 3) with the spectrum of photos, and as many with edges, textures and plain colour."""
    return np.concatenate([synthetic_images(height, width), _shapes(height, width)])


def _shapes(height: int, width: int) -> NDArray[np.uint8]:
    """Discs, bars and chequers of random colours over a ramp between two others."""
    random = np.random.default_rng(1)
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    pictures = np.empty((_SHAPES, height, width, 3), np.uint8)
    for picture in pictures:
        ramp = (np.cos(angle := random.uniform(0, np.pi)) * x + np.sin(angle) * y)[..., None]
        colours = random.uniform(0, 255, (8, 3))
        canvas = colours[0] + ramp * (colours[1] - colours[0]) / max(ramp.max() - ramp.min(), 1e-6)
        for colour in colours[2:5]:
            centre_y, centre_x, radius = random.uniform(0.1, 0.9), random.uniform(0.1, 0.9), random.uniform(0.05, 0.3)
            canvas[(y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2] = colour
        period = random.uniform(0.05, 0.2)
        bars = (np.floor(x / period) % 2 == 0) & (np.abs(y - random.uniform(0.2, 0.8)) < _BAR)
        chequers = (np.floor(x / period) + np.floor(y / period)) % 2 == 0
        corner = (x > random.uniform(0.5, 0.8)) & (y > random.uniform(0.5, 0.8))
        canvas[bars], canvas[chequers & corner] = colours[5], colours[6]
        picture[:] = np.clip(canvas, 0, 255)
    return pictures
