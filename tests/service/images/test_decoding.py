"""Images come out as people see them, where the published two-step pipeline would put them."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from service.images.decoding import FORMATS, Decoded, Geometry, decode
from service.images.geometry import crop_box

Pixels = NDArray[np.uint8]
IMAGENET = Geometry(224, 224, 0.9, "bicubic")
PHOTOS: list[Pixels] = load_sample_images().images
PHOTO = Image.fromarray(PHOTOS[0])


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole(data: bytes | bytearray | memoryview, width: int, height: int) -> Pixels:
    """All pixels, neither resized nor cropped."""
    return decode(data, Geometry(height, width, 1.0, "bilinear"), max_pixels=10**6).pixels


def two_steps(image: Image.Image, geometry: Geometry) -> Pixels:
    """torchvision's Resize and CenterCrop, for a square target."""
    shorter = math.floor(geometry.width / geometry.crop)
    scaled = [shorter if side == min(image.size) else int(shorter * side / min(image.size)) for side in image.size]
    resized = image.resize((scaled[0], scaled[1]), Image.Resampling[geometry.interpolation.upper()])
    left, top = (round((side - geometry.width) / 2.0) for side in scaled)
    return np.asarray(resized.crop((left, top, left + geometry.width, top + geometry.height)))


def difference(a: Pixels, b: Pixels) -> NDArray[np.int16]:
    assert a.shape == b.shape
    apart: NDArray[np.int16] = np.abs(a.astype(np.int16) - b)
    return apart


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_contiguous_rgb_of_the_models_size(kind: str) -> None:
    result = decode(encode(PHOTO, kind), IMAGENET, max_pixels=10**6)

    assert (result.width, result.height) == (640, 427)
    assert result.pixels.shape == (224, 224, 3)
    assert result.pixels.dtype == np.uint8
    assert result.pixels.flags.c_contiguous
    assert difference(result.pixels, two_steps(PHOTO, IMAGENET)).mean() < 6  # JPEG, GIF's palette, WebP and AVIF lose


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_kind_of_buffer_is_read(kind: type[bytes | bytearray | memoryview]) -> None:
    assert np.array_equal(whole(kind(encode(PHOTO, "PNG")), 640, 427), PHOTOS[0])


@pytest.mark.parametrize("photo", [0, 1])
@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", [64, 224, 384])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_one_call_is_within_two_levels_of_resize_then_crop_on_landscape_photos(
    photo: int, crop: float, size: int, interpolation: Literal["bilinear", "bicubic"]
) -> None:
    geometry, image = Geometry(size, size, crop, interpolation), Image.fromarray(PHOTOS[photo])

    apart = difference(decode(encode(image, "BMP"), geometry, max_pixels=10**6).pixels, two_steps(image, geometry))

    assert apart.max() <= 2
    assert (apart > 0).mean() < 0.009


@pytest.mark.parametrize("photo", [0, 1])
@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", [64, 224, 384])
def test_one_call_is_close_to_resize_then_crop_on_portrait_photos(photo: int, crop: float, size: int) -> None:
    """Pillow may filter columns before rows when that is less work; the clipping between the passes then differs."""
    geometry, image = Geometry(size, size, crop, "bicubic"), Image.fromarray(np.rot90(PHOTOS[photo]))

    apart = difference(decode(encode(image, "BMP"), geometry, max_pixels=10**6).pixels, two_steps(image, geometry))

    assert apart.max() <= 12
    assert apart.mean() < 0.25
    assert (apart > 1).mean() < 0.002


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.integers(32, 128),
    crop=st.floats(0.5, 1),
    seed=st.integers(0, 99),
)
def test_one_call_is_near_resize_then_crop_on_any_size_of_noise(
    width: int, height: int, size: int, crop: float, seed: int
) -> None:
    """Noise is the worst case for the clipping between passes: bilinear can't overshoot, so it shows the geometry."""
    if max(width, height) > 40 * min(width, height):
        width = height
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    geometry = Geometry(size, size, crop, "bilinear")

    apart = difference(decode(encode(image, "BMP"), geometry, max_pixels=10**6).pixels, two_steps(image, geometry))

    assert apart.max() <= 3


@given(width=st.integers(1, 65535), height=st.integers(1, 65535), tall=st.integers(32, 512), wide=st.integers(32, 512))
def test_the_crop_lies_inside_the_image_in_the_targets_proportions(
    width: int, height: int, tall: int, wide: int
) -> None:
    left, top, right, bottom = crop_box(width, height, Geometry(tall, wide, 0.9, "bicubic"))

    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(wide / tall, rel=0.05)


def test_an_image_of_the_models_size_stays_as_it_is() -> None:
    assert np.array_equal(whole(encode(PHOTO, "PNG"), 640, 427), PHOTOS[0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_if_before_all_else(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PHOTO, kind, exif=exif, **({"lossless": True} if kind == "WebP" else {}))
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")

    result = decode(data, IMAGENET, max_pixels=10**6)
    apart = difference(result.pixels, decode(encode(upright, "BMP"), IMAGENET, max_pixels=10**6).pixels)

    assert (result.width, result.height) == upright.size
    assert apart.max() <= 8
    assert (apart > 1).mean() < 0.002


def grey(kind: str, mode: str, values: list[float], dtype: str) -> list[int]:
    array = np.array([values * 2, values * 2], dtype)
    image = Image.frombytes(mode, (array.shape[1], 2), array.tobytes())
    return [int(v) for v in whole(encode(image, kind), array.shape[1], 2)[0, : len(values), 0]]


@pytest.mark.parametrize(
    ("kind", "mode", "dtype", "values", "seen"),
    [
        ("PNG", "I;16", "<u2", [0, 257, 32768, 65535], [0, 1, 128, 255]),
        ("TIFF", "I;16", "<u2", [0, 257, 32768, 65535], [0, 1, 128, 255]),
        ("TIFF", "I;16B", ">u2", [0, 257, 32768, 65535], [0, 1, 128, 255]),
        ("TIFF", "I", "<i4", [0, 257, 65535], [0, 1, 255]),
        ("TIFF", "I", "<i4", [-100_000, 0, 100_000], [0, 128, 255]),
        ("TIFF", "F", "<f4", [0, 0.5, 1], [0, 128, 255]),
        ("TIFF", "F", "<f4", [0, 100, 255], [0, 100, 255]),
        ("TIFF", "F", "<f4", [float("nan"), -1e38, 0, 1e38], [128, 0, 128, 255]),
    ],
)
def test_deep_grey_is_scaled_not_clipped(
    kind: str, mode: str, dtype: str, values: list[float], seen: list[int]
) -> None:
    assert grey(kind, mode, values, dtype) == seen


RED, CLEAR = (200, 30, 40, 255), (200, 30, 40, 0)


def two_pixels(mode: str) -> Image.Image:
    image = Image.new("RGBA", (4, 4), RED)
    image.paste(CLEAR, (2, 0, 4, 4))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WebP", "TIFF"])
def test_transparency_lies_on_white(kind: str, mode: str) -> None:
    pixels = whole(encode(two_pixels(mode), kind, **({"lossless": True} if kind == "WebP" else {})), 4, 4)

    assert (pixels[:, 2:] == 255).all()
    assert (pixels[:, :2] < 201).all()


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palettes_transparency_lies_on_white(kind: str, transparency: int | bytes) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 30, 40, 1, 2, 3])
    image.paste(1, (2, 0, 4, 4))

    pixels = whole(encode(image, kind, transparency=1 if kind == "GIF" else transparency), 4, 4)

    assert (pixels[:, 2:] == 255).all()
    assert pixels[0, 0].tolist() == [200, 30, 40]


@pytest.mark.parametrize(("mode", "key"), [("RGB", (1, 2, 3)), ("L", 7), ("I;16", 700), ("1", 0)])
def test_a_pngs_transparent_colour_lies_on_white(mode: str, key: int | tuple[int, ...]) -> None:
    pixels = whole(encode(Image.new(mode, (4, 4), key), "PNG", transparency=key), 4, 4)

    assert (pixels == 255).all()


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "YCbCr"), ("TIFF", "LAB")])
def test_other_colour_spaces_become_rgb(kind: str, mode: str) -> None:
    image = (
        Image.new("RGB", (8, 8), (200, 30, 40)).convert(mode)
        if mode != "LAB"
        else Image.new(mode, (8, 8), (109, 193, 172))
    )

    seen = whole(encode(image, kind), 8, 8)[4, 4].astype(int)

    assert np.abs(seen - (200, 30, 40)).max() < 16


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_black_and_white_stay_so(mode: str) -> None:
    image = Image.new("L", (8, 8), 255).convert(mode)

    assert (whole(encode(image, "PNG"), 8, 8) == 255).all()


def test_grey_spread_after_resizing_is_grey_spread_before() -> None:
    """But for what differs between the two kernels."""
    image = PHOTO.convert("L")

    late = decode(encode(image, "PNG"), IMAGENET, max_pixels=10**6).pixels
    early = decode(encode(image.convert("RGB"), "PNG"), IMAGENET, max_pixels=10**6).pixels

    assert difference(late, early).max() <= 2
    assert difference(late, early).mean() < 0.02


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WebP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    if kind not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    frames = [Image.new("RGB", (32, 32), (10 * i, 0, 0)) for i in range(20)]

    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])

    assert whole(data, 32, 32).max() < 3


def test_threads_do_not_disturb_each_other() -> None:
    data = [encode(Image.fromarray(photo), kind) for photo in PHOTOS for kind in FORMATS] * 3
    alone = [decode(d, IMAGENET, max_pixels=10**6) for d in data]

    def again(item: bytes) -> Decoded:
        return decode(item, IMAGENET, max_pixels=10**6)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(again, data))

    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(alone, together, strict=True))
