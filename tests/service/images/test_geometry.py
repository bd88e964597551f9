"""Where the model's input lies in the image, seen by decoding ramps of known slope."""

from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.images.decoding import decode
from service.images.geometry import Geometry, region

SIDE = 64


def ramp(width: int, height: int) -> bytes:
    """Red tells the column and green the row: 0 to 255 from edge to edge. Blue is 255, which no border is."""
    pixels = np.full((height, width, 3), 255.0)
    pixels[..., 0] = (np.arange(width) + 0.5) / width * 255
    pixels[..., 1] = ((np.arange(height) + 0.5) / height * 255)[:, None]
    file = BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "png")
    return file.getvalue()


def edges(values: NDArray[np.floating], inside: NDArray[np.bool_], length: int) -> tuple[float, float]:
    """Where the input begins and ends on an axis of `length` pixels, by a line through its values."""
    at = np.flatnonzero(inside)[2:-2]  # filters bend the ramp at its ends
    slope, start = np.polyfit(at + 0.5, values[at] / 255 * length, 1)
    return float(start), float(start + slope * len(values))


@pytest.mark.parametrize("size", [(600, 300), (250, 400), (101, 203), (40, 90), (64, 64)])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(SIDE, SIDE, 0.875, "bicubic"),
        Geometry(SIDE, 96, 0.9, "bilinear"),
        Geometry(SIDE, SIDE, 1.0, "bilinear", "stretch"),
        Geometry(SIDE, SIDE, 1.0, "bilinear", "letterbox", fill=(0, 0, 0)),
        Geometry(SIDE, SIDE, 1.0, "nearest", "center_crop"),
    ],
    ids=lambda each: f"{each.resize} {each.width}",
)
def test_the_region_is_where_the_input_shows_the_image(size: tuple[int, int], geometry: Geometry) -> None:
    pixels = decode(ramp(*size), geometry, max_pixels=10**6).pixels.astype(float)
    image: NDArray[np.bool_] = pixels[..., 2] > 250
    across = edges(pixels[:, :, 0][image.any(axis=1)].mean(axis=0), np.any(image, axis=0), size[0])
    down = edges(pixels[:, :, 1][:, image.any(axis=0)].mean(axis=1), np.any(image, axis=1), size[1])

    left, top, right, bottom = region(*size, geometry)

    tolerance = 1 + max(size) / 100  # of values of 8 bits
    assert (left, right) == pytest.approx(across, abs=tolerance)
    assert (top, bottom) == pytest.approx(down, abs=tolerance)
