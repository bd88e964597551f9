"""torch's kernel gives what Pillow's gives, within 2 levels of 255, and Pillow takes what is not for torch."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from service.images import resampling
from service.images.geometry import Box, Geometry, crop_box
from service.images.resampling import VECTORISED, resample

PHOTO = Image.fromarray(load_sample_images().images[0])
needs_avx2 = pytest.mark.skipif(not VECTORISED, reason="torch's kernel needs AVX2")


def by_pillow(image: Image.Image, box: Box, size: tuple[int, int], interpolation: str) -> NDArray[np.uint8]:
    return np.asarray(image.resize(size, Image.Resampling[interpolation.upper()], box=box).convert("RGB"))


def apart(image: Image.Image, box: Box, size: tuple[int, int], interpolation: Any) -> NDArray[np.int16]:
    pixels = resample(image, box, size, interpolation)
    assert pixels.shape == (size[1], size[0], 3)
    difference: NDArray[np.int16] = np.abs(pixels.astype(np.int16) - by_pillow(image, box, size, interpolation))
    return difference


@needs_avx2
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("side", [64, 224, 384, 640])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_photos_are_within_two_levels_of_pillow(
    interpolation: Literal["bilinear", "bicubic"], crop: float, side: int, scale: int
) -> None:
    box = crop_box(*PHOTO.size, Geometry(side, side, crop, interpolation))
    image = PHOTO.resize((-(-640 // scale), -(-427 // scale)))  # as a JPEG of reduced size, which is rounded up

    difference = apart(image, tuple(v / scale for v in box), (side, side), interpolation)  # type: ignore[arg-type]

    assert difference.mean() < 0.02
    assert difference.max() <= 2


@needs_avx2
@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    side=st.tuples(st.integers(8, 128), st.integers(8, 128)),
    crop=st.floats(0.5, 1),
    mirrored=st.booleans(),
)
def test_noise_of_any_size_is_within_two_levels_of_pillow(
    width: int, height: int, side: tuple[int, int], crop: float, mirrored: bool
) -> None:
    """Bilinear, as bicubic's overshooting is clipped between the passes, whose order Pillow chooses."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    left, top, right, bottom = crop_box(width, height, Geometry(side[1], side[0], crop, "bilinear"))
    box = (width - right, height - bottom, width - left, height - top) if mirrored else (left, top, right, bottom)

    assert apart(Image.fromarray(noise), box, side, "bilinear").max() <= 2


@pytest.mark.parametrize(
    ("image", "box"),
    [
        (PHOTO.convert("L"), (128, 21.5, 512, 405.5)),
        (PHOTO, (100.3, 20.7, 484.3, 404.7)),  # begins between two pixels of the image scaled as a whole
        (PHOTO.resize((2100, 1000)), (500, 0, 1500, 1000)),
        (PHOTO.resize((200, 150)), (25, 0, 175, 150)),
        (PHOTO.resize((40_000, 10)), (20_000, 0, 20_010, 10)),
    ],
    ids=["grey", "off the grid", "large", "small", "flat"],
)
def test_what_is_not_for_torch_is_pillows_to_the_bit(image: Image.Image, box: Box) -> None:
    assert not apart(image, box, (224, 224), "bicubic").any()


def test_a_processor_without_avx2_has_pillows_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "VECTORISED", False)

    assert not apart(PHOTO, crop_box(640, 427, Geometry(224, 224, 0.9, "bicubic")), (224, 224), "bicubic").any()


def test_an_image_of_the_models_size_is_not_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "resize", None)
    monkeypatch.setattr(resampling, "_by_torch", None)

    assert np.array_equal(resample(PHOTO, (0, 0, 640, 427), (640, 427), "bicubic"), np.asarray(PHOTO))
