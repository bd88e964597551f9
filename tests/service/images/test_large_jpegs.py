"""Photos of phones, of 50 to 200 megapixels: what counts is what is decoded of them, and no more is held in memory."""

import io
import struct
import sys
from collections.abc import Callable, Iterator
from time import process_time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from app.settings import Settings
from service.errors import ImageTooLarge, InvalidImage
from service.images.costs import LARGE_BYTES
from service.images.decoding import Geometry, cost, decode
from service.images.header import megapixels
from tests.service.images.peaks import measuring

LIMIT = int(Settings.model_fields["max_image_megapixels"].default * 1e6)
GEOMETRY = Geometry(224, 224, 0.9, "bicubic")
PHOTO = Image.fromarray(load_sample_images().images[0])
FIFTY = (8160, 6144)
PHONES = [FIFTY, (9248, 6944), (12000, 9000), (16384, 12288)]  # 50.1, 64, 108 and 201 megapixels


def jpeg(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def enlarged(size: tuple[int, int]) -> Image.Image:
    return PHOTO.resize(size, Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def photos() -> dict[tuple[int, int], bytes]:
    return {size: jpeg(enlarged(size)) for size in PHONES}


@pytest.fixture(scope="module")
def grown() -> Iterator[Callable[..., int]]:
    with measuring() as measure:
        yield measure


def declared(data: bytes, width: int, height: int) -> bytes:
    """`data` with another size in its header."""
    at = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    ("size", "side"), [*((size, 224) for size in PHONES), (FIFTY, 1024), (PHONES[-1], 1024)], ids=str
)
def test_a_phones_photo_is_answered_by_default_as_pillow_resizes_its_draft(
    photos: dict[tuple[int, int], bytes], size: tuple[int, int], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    result = decode(photos[size], Geometry(side, side, 1.0, "bicubic"), max_pixels=LIMIT)

    with Image.open(io.BytesIO(photos[size])) as draft:
        draft.draft("RGB", (2 * side, 2 * side))
        expected = center_crop(resize(draft, [side], InterpolationMode.BICUBIC), [side])
    difference = np.abs(result.pixels.astype(int) - np.asarray(expected))
    assert (result.width, result.height) == size
    assert difference.mean() < 0.8
    assert np.percentile(difference, 99) <= 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", PHONES, ids=str)
def test_a_phones_photo_takes_the_memory_of_what_is_decoded(
    photos: dict[tuple[int, int], bytes], grown: Callable[..., int], size: tuple[int, int]
) -> None:
    data = photos[size]
    costs = cost(data, GEOMETRY, max_pixels=LIMIT)

    taken = grown(data, scaled=True)

    assert costs.bytes <= 6 * size[0] * size[1] / 64
    assert costs.large == (costs.bytes > LARGE_BYTES)
    assert taken - 2 * len(data) < costs.bytes + 12_000_000
    assert taken < 40_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("subsampling", "each"), [("4:2:0", 3), ("4:4:4", 6)])
def test_a_progressive_photo_takes_all_its_coefficients(grown: Callable[..., int], subsampling: str, each: int) -> None:
    size = (4000, 3000)
    data = jpeg(enlarged(size), progressive=True, subsampling=subsampling)
    costs = cost(data, GEOMETRY, max_pixels=LIMIT)

    taken = grown(data, scaled=True)

    assert costs.pixels == 12_000_000
    assert 0.98 * each * 12_000_000 < taken < costs.bytes + 8_000_000
    assert costs.bytes < (each + 0.9) * 12_000_000 + 16_000_000


def test_a_progressive_photo_counts_as_it_is_and_the_refusal_says_what_helps() -> None:
    data = declared(jpeg(PHOTO, progressive=True), *FIFTY)

    with pytest.raises(ImageTooLarge) as caught:
        decode(data, GEOMETRY, max_pixels=LIMIT)

    assert str(caught.value) == (
        "the image has 50.14 megapixels, the limit is 50 (PVT_MAX_IMAGE_MEGAPIXELS); a progressive JPEG is decoded in "
        "full, a baseline one may be larger"
    )


def test_switched_off_and_for_models_that_need_all_pixels_every_pixel_counts() -> None:
    data = declared(jpeg(PHOTO), *FIFTY)
    nearest = Geometry(224, 224, 0.9, "nearest")

    for geometry, scaled in ((GEOMETRY, False), (nearest, True)):
        with pytest.raises(ImageTooLarge, match=r"^the image has 50.14 megapixels, the limit is 50 "):
            decode(data, geometry, max_pixels=LIMIT, scaled_jpeg=scaled)


def test_an_eighth_of_the_pixels_counts_at_least_so_that_a_header_has_its_limit_too() -> None:
    small = jpeg(PHOTO)

    assert cost(declared(small, 20_000, 20_000), GEOMETRY, max_pixels=LIMIT).pixels == LIMIT
    with pytest.raises(ImageTooLarge) as caught:
        decode(declared(small, 20_000, 20_008), GEOMETRY, max_pixels=LIMIT)
    assert str(caught.value) == (
        "the image has 400.2 megapixels, counted as 50.02, the limit is 50 (PVT_MAX_IMAGE_MEGAPIXELS)"
    )
    assert cost(declared(small, 20_000, 16_000), Geometry(1024, 1024, 1.0, "bicubic"), max_pixels=LIMIT).pixels == (
        40_000_000
    )
    with pytest.raises(ImageTooLarge, match=r"has 245.8 megapixels, counted as 61.44, the limit is 50"):
        decode(declared(small, 60_000, 4096), Geometry(1024, 1024, 1.0, "bicubic"), max_pixels=LIMIT)


@pytest.mark.parametrize("size", [(65_500, 65_500), (20_000, 20_000)])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": "4:4:4"}, {"progressive": True}, {"restart_marker_blocks": 1}], ids=str
)
def test_a_tiny_file_that_declares_a_huge_jpeg_is_refused_in_no_time(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    data, start = declared(jpeg(PHOTO.resize((64, 64)), **options), *size), process_time()

    with pytest.raises((InvalidImage, ImageTooLarge)):
        decode(data, GEOMETRY, max_pixels=LIMIT)

    assert process_time() - start < 2


def test_a_whole_jpeg_of_the_most_pixels_that_pack_best_is_read_in_a_moment() -> None:
    """Of blocks of a few bits: the fewest bytes for the most work."""
    data, start = jpeg(Image.new("L", (20_000, 20_000))), process_time()

    decode(data, GEOMETRY, max_pixels=LIMIT)

    assert process_time() - start < 4


def test_a_photo_with_a_second_picture_behind_it_counts_as_one_without() -> None:
    """MPO: as phones store a depth map or a gain map."""
    other = PHOTO.resize((320, 240))
    data = jpeg(PHOTO.resize((4000, 3000)), "MPO", save_all=True, append_images=[other])
    alone = jpeg(PHOTO.resize((4000, 3000)))

    assert cost(data, GEOMETRY, max_pixels=LIMIT) == cost(alone, GEOMETRY, max_pixels=LIMIT)


def test_places_are_charged_by_the_time_that_a_jpeg_takes() -> None:
    """A progressive one is decoded in full; another takes a quarter of the time."""
    photo = jpeg(PHOTO, quality=95)

    assert megapixels(declared(photo, *FIFTY)) == pytest.approx(50.13504 / 4)
    assert megapixels(declared(jpeg(PHOTO, quality=95, progressive=True), *FIFTY)) == pytest.approx(50.13504)
