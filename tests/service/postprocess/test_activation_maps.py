from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from service.postprocess import VIRIDIS, Explanation, overlay
from service.results import ImageResult, Timing

GREY = np.full((64, 96, 3), 128, np.uint8)


def explanation(heat: list[list[float]], pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = GREY) -> Explanation:
    inferred = ImageResult(1, 1, None, Timing(0, 0, 0, 0), pixels)  # type: ignore[arg-type]  # outputs are not looked at
    return Explanation(inferred, 0, "zero", 0.5, 1.0, 0.5, (0, 0, 96, 64), np.array(heat, np.float32))


def shown(png: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.asarray(Image.open(BytesIO(png))).astype(np.int64)


def test_the_map_goes_from_dark_blue_to_yellow_and_never_beyond() -> None:
    image = shown(overlay(explanation([[0, 0, 9], [0, 0, 0]]), 1))

    assert image.shape == (64, 96, 3)
    np.testing.assert_array_equal(image[-1, 0], VIRIDIS[0])
    np.testing.assert_array_equal(image[0, -1], VIRIDIS[255])
    # Of the colours between, as of the values, the order is kept: nothing rings behind the peak or before it.
    greens = image[0, :, 1]
    assert (np.diff(greens) >= 0).all()
    assert greens.min() == VIRIDIS[0, 1]


def test_alpha_mixes_image_and_map() -> None:
    heat = [[0.0, 1.0], [2.0, 3.0]]
    none, half, all_ = (shown(overlay(explanation(heat), alpha)) for alpha in (0, 0.5, 1))

    np.testing.assert_array_equal(none, GREY)
    assert np.abs(half - (GREY.astype(np.int64) + all_) / 2).max() <= 0.5


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_a_map_that_is_the_same_everywhere_is_all_dark(value: float) -> None:
    image = shown(overlay(explanation([[value] * 3] * 2), 1))

    assert (image == VIRIDIS[0]).all()


def test_the_table_is_viridis() -> None:
    # First, middle and last colour as its authors published them, of 255.
    assert VIRIDIS[[0, 128, 255]].tolist() == [[68, 1, 84], [33, 145, 140], [253, 231, 37]]
    # Lightness rises without a step back, which is what makes it uniform (luma is close enough to see that).
    luma = VIRIDIS[::5] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luma) > 0).all()
