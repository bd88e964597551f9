"""HEIF, as phones write it, against the same image as PNG. Its encoder is x265, its decoder libde265."""

import io
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from service.errors import ImageTooLarge, InvalidImage
from service.images.decoding import Decoded, Geometry, cost, decode
from service.images.header import megapixels
from service.images.limits import codec_bytes
from tests.service.images.peaks import measuring
from tests.service.images.test_wholeness import PHOTO

GEOMETRY = Geometry(64, 64, 0.9, "bicubic")


def saved(image: Image.Image, kind: str = "HEIF", **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **({"quality": 95} if kind == "HEIF" else {}), **options)
    return buffer.getvalue()


def opened(data: bytes) -> Decoded:
    return decode(data, GEOMETRY, max_pixels=10**6)


def distance(one: bytes, other: bytes) -> float:
    return float(np.abs(opened(one).pixels.astype(int) - opened(other).pixels).mean())


HEIF = saved(PHOTO)


@pytest.fixture(scope="module")
def grown() -> Iterator[Callable[..., int]]:
    with measuring() as measure:
        yield measure


def turned(orientation: int) -> dict[str, Any]:
    (exif := Image.Exif())[0x0112] = orientation
    return {"exif": exif.tobytes()}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_once(orientation: int) -> None:
    """The encoder writes boxes that turn it, and the EXIF block says the same again."""
    data, same = saved(PHOTO, **turned(orientation)), saved(PHOTO, "PNG", **turned(orientation))

    found, expected = opened(data), opened(same)

    assert (found.width, found.height) == (expected.width, expected.height)
    assert distance(data, same) < 4


@pytest.mark.parametrize("options", [{"chroma": "444"}, {"tile_size": 64}, {"tile_size": 64, **turned(6)}])
def test_grids_and_full_colour_are_read(options: dict[str, Any]) -> None:
    exif = {"exif": options["exif"]} if "exif" in options else {}

    assert distance(saved(PHOTO, **options), saved(PHOTO, "PNG", **exif)) < 4


def test_grey_is_read() -> None:
    assert distance(saved(PHOTO.convert("L")), saved(PHOTO.convert("L"), "PNG")) < 4


def test_alpha_lies_on_white() -> None:
    (image := PHOTO.copy()).putalpha(Image.linear_gradient("L").resize(PHOTO.size))

    assert distance(saved(image), saved(image, "PNG")) < 4


@pytest.mark.parametrize("mode", ["RGB;16", "I;16"])
def test_ten_bits_keep_their_scale(mode: str) -> None:
    image = PHOTO if mode == "RGB;16" else PHOTO.convert("L")
    deep = np.asarray(image).astype(np.uint16) * 257
    pillow_heif.from_bytes(mode, image.size, deep.tobytes()).save(buffer := io.BytesIO(), quality=95)

    assert distance(buffer.getvalue(), saved(image, "PNG")) < 4


def test_a_file_of_a_neutral_brand_is_known_by_how_it_is_coded() -> None:
    assert HEIF[8:12] == b"heic"
    neutral = HEIF[:8] + b"mif1" + HEIF[12:]

    assert distance(neutral, HEIF) == 0
    length = int.from_bytes(HEIF[:4])
    only = neutral[:16] + b"mif1" * ((length - 16) // 4) + neutral[length:]
    assert distance(only, HEIF) == 0


def test_a_file_that_is_cut_anywhere_is_refused() -> None:
    for end in [*range(0, len(HEIF), len(HEIF) // 40), *range(len(HEIF) - 20, len(HEIF))]:
        with pytest.raises(InvalidImage) as caught:
            opened(HEIF[:end])
        assert "\n" not in str(caught.value)


def test_its_size_is_checked_before_a_pixel_is_decoded() -> None:
    with pytest.raises(ImageTooLarge):
        decode(HEIF, GEOMETRY, max_pixels=160 * 107 - 1)
    at = HEIF.index(b"ispe") + 8
    lying = HEIF[:at] + struct.pack(">II", 30_000, 30_000) + HEIF[at + 8 :]
    with pytest.raises((ImageTooLarge, InvalidImage)):  # libheif compares it with the bytes of the file first
        opened(lying)
    assert cost(HEIF, GEOMETRY, max_pixels=10**6).bytes >= 9 * 160 * 107
    assert megapixels(saved(PHOTO.resize((1024, 512)), tile_size=256)) == pytest.approx(1024 * 512 / 1e6)


def test_a_photo_of_48_megapixels_fits_into_the_limit_of_50() -> None:
    """Of 8 bits, as phones write them; here so many times smaller."""
    limit = 160 * 107 * 50_000_000 // (8064 * 6048)

    for chroma in ("420", "422", "444"):
        assert decode(saved(PHOTO, chroma=chroma), GEOMETRY, max_pixels=limit).width == 160


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("mode", "bits"), [("RGB", 8), ("RGB;16", 10), ("RGBA;16", 10)])
def test_no_more_memory_is_taken_than_counted(mode: str, bits: int, grown: Callable[..., int]) -> None:
    """Colours are at full size, which takes most."""
    size, channels = (2048, 1040), 4 if "A" in mode else 3
    pixels = np.full((size[1], size[0], channels), 90, np.uint8 if bits == 8 else np.uint16)
    pillow_heif.from_bytes(mode, size, pixels.tobytes()).save(buffer := io.BytesIO(), quality=30, chroma="444")
    with Image.open(buffer) as image:
        assert image.info["bit_depth"] == bits
        counted = codec_bytes(image) * size[0] * size[1]

    grown(HEIF)  # the first one warms up

    assert 0.7 * counted < grown(buffer.getvalue()) < counted + 4_000_000


def test_a_header_of_another_size_is_refused() -> None:
    at = HEIF.index(b"ispe") + 8
    for size in ((64, 64), (320, 214)):
        with pytest.raises(InvalidImage):
            opened(HEIF[:at] + struct.pack(">II", *size) + HEIF[at + 8 :])
