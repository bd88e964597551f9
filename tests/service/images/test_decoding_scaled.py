"""A JPEG decoded at a fraction of its sides looks as it does decoded in full, and lies where it lay."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_images

from service.errors import InvalidImage
from service.images.decoding import Decoded, Geometry, decode

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]


def model(side: int, crop: float = 0.9) -> Geometry:
    return Geometry(side, side, crop, "bicubic")


def photo(width: int, height: int, which: int = 0) -> Image.Image:
    """A sample photo enlarged, with the grain of a sensor, so that no scale of it is smooth."""
    pixels = np.asarray(PHOTOS[which].resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("kind", "JPEG"), **{"quality": 90, **options})
    return buffer.getvalue()


def both(data: bytes, geometry: Geometry) -> tuple[Decoded, Decoded]:
    """Decoded scaled, and in full."""
    scaled, full = (decode(data, geometry, max_pixels=5 * 10**7, scaled_jpeg=switch) for switch in (True, False))
    assert (scaled.width, scaled.height) == (full.width, full.height)
    return scaled, full


def apart(data: bytes, geometry: Geometry) -> NDArray[np.int16]:
    scaled, full = both(data, geometry)
    difference: NDArray[np.int16] = np.abs(scaled.pixels.astype(np.int16) - full.pixels)
    return difference


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What libjpeg had to decode at another size than the file's."""
    sizes, draft = [], JpegImageFile.draft

    def seen(self: JpegImageFile, *args: Any) -> Any:
        drafted = draft(self, *args)
        sizes.append(self.size)
        return drafted

    monkeypatch.setattr(JpegImageFile, "draft", seen)
    return sizes


@pytest.mark.parametrize(
    ("size", "side", "reduced"),
    [
        ((4000, 3000), 224, (1000, 750)),
        ((4000, 3000), 64, (500, 375)),
        ((3000, 4000), 64, (375, 500)),
        ((2001, 1501), 224, (1001, 751)),
        ((640, 427), 64, (320, 214)),
        ((992, 992), 224, (496, 496)),
        ((991, 991), 224, None),  # its crop of 895 is less than four times 224
        ((640, 427), 224, None),
        ((6000, 640), 224, None),  # in one direction only
    ],
)
def test_the_largest_reduction_is_taken_that_leaves_twice_the_models_input(
    decoded_sizes: list[tuple[int, int]], size: tuple[int, int], side: int, reduced: tuple[int, int] | None
) -> None:
    result = decode(jpeg(Image.new("RGB", size)), model(side), max_pixels=5 * 10**7)

    assert (result.width, result.height) == size
    assert decoded_sizes == ([reduced] if reduced else [])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("side", [32, 48, 64, 88])
def test_photos_as_they_come_are_within_bounds_of_full_decoding(which: int, subsampling: str, side: int) -> None:
    difference = apart(jpeg(PHOTOS[which], subsampling=subsampling), model(side))

    assert 0 < difference.mean() < 1.5
    assert np.percentile(difference, 99) <= 7
    assert difference.max() <= 16


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("size", "side"), [((4000, 3000), 224), ((4000, 3000), 128), ((2047, 1367), 224)])
def test_large_photos_are_within_closer_bounds_of_full_decoding(which: int, size: tuple[int, int], side: int) -> None:
    difference = apart(jpeg(photo(*size, which)), model(side))

    assert 0 < difference.mean() < 0.6
    assert np.percentile(difference, 99) <= 3
    assert difference.max() <= 7


def waves(width: int, height: int) -> Image.Image:
    """One wave and a half across and down: smooth for every filter, yet a pixel's shift is a level or more."""
    y, x = np.mgrid[:height, :width] * (3 * np.pi) / np.array([[[height]], [[width]]])
    values = np.stack([128 + 110 * np.sin(x), 128 + 110 * np.sin(y), 128 + 100 * np.cos(x + y)], -1)
    return Image.fromarray(values.astype(np.uint8))


@example(width=289, height=289, side=16, crop=1)
@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(258, 800), height=st.integers(258, 800), side=st.integers(16, 64), crop=st.sampled_from([0.9, 1])
)
def test_nothing_is_shifted_whatever_the_remainder_of_the_size(width: int, height: int, side: int, crop: float) -> None:
    """At 1/8 the rounding-up of sizes is worth up to 7 pixels, which show as 10 levels and more."""
    difference = apart(jpeg(waves(width, height), quality=98, subsampling="4:4:4"), model(side, crop))

    assert difference[1:-1, 1:-1].max() <= 2
    # The outermost pixels may hold what the encoder made up beyond the edge: 5 in the worst of 4,000 sizes.
    assert difference.max() <= 5
    assert difference.mean() < 0.8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_upright_and_in_place(decoded_sizes: list[tuple[int, int]], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = PHOTOS[0].crop((0, 0, 611, 409))
    data = jpeg(image, exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        upright = ImageOps.exif_transpose(stored)

    result = decode(data, model(40), max_pixels=10**6)
    upright.save(whole := io.BytesIO(), "BMP")
    difference = np.abs(result.pixels.astype(int) - decode(whole.getvalue(), model(40), max_pixels=10**6).pixels)

    assert decoded_sizes == [(153, 103)]
    assert (result.width, result.height) == upright.size
    assert difference.mean() < 1.2
    assert difference.max() <= 16


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"kind": "MPO"}])
def test_every_kind_of_jpeg_is_reduced_alike(
    decoded_sizes: list[tuple[int, int]], mode: str, options: dict[str, Any]
) -> None:
    data = jpeg(PHOTOS[0].convert(mode), **options)

    difference = apart(data, model(48))

    assert decoded_sizes == [(160, 107)]
    assert difference.mean() < 1.2
    assert difference.max() <= 16


def test_switched_off_a_jpeg_gives_what_its_decoded_pixels_give(decoded_sizes: list[tuple[int, int]]) -> None:
    data = jpeg(photo(2000, 1500))
    with Image.open(io.BytesIO(data)) as image:
        image.save(whole := io.BytesIO(), "BMP")

    full = decode(data, model(224), max_pixels=10**7, scaled_jpeg=False).pixels

    assert decoded_sizes == []
    assert np.array_equal(full, decode(whole.getvalue(), model(224), max_pixels=10**7).pixels)


def test_a_reduced_jpeg_that_is_cut_is_refused_all_the_same() -> None:
    data = jpeg(PHOTOS[0])

    with pytest.raises(InvalidImage, match="truncated JPEG"):
        decode(data[: len(data) // 2], model(48), max_pixels=10**6)
