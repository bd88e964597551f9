"""Numbers of more than 8 bits become 0 to 255: on a scale that they fill, else from the lowest to the highest."""

import io
import struct
import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidImage
from service.images.decoding import Geometry, decode

NAN, INF = float("nan"), float("inf")


def seen(values: Any, kind: str = "f4", **options: Any) -> list[int]:
    """What a TIFF with `values` in its first row, and again in its second, looks like."""
    pixels = np.array([values, values], kind)
    tifffile.imwrite(buffer := io.BytesIO(), pixels, photometric=options.pop("photometric", "minisblack"), **options)
    levels: list[int] = shown(buffer.getvalue(), pixels.shape[1], 2)[0].tolist()
    return levels


def shown(data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    return decode(data, Geometry(height, width, 1.0, "bilinear"), max_pixels=10**6).pixels[..., 0]


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("scale", [1, 255, 65535])
def test_floats_that_fill_a_scale_keep_it(scale: int, kind: str) -> None:
    assert seen([0.2 * scale, 0.6 * scale], kind) == [51, 153]
    assert seen([0, 0.501 * scale], kind) == [0, 128]


@pytest.mark.parametrize("kind", ["i2", "i4", "u4"])
@pytest.mark.parametrize("scale", [255, 65535])
def test_integers_that_fill_a_scale_keep_it(scale: int, kind: str) -> None:
    if scale < np.iinfo(kind).max:
        assert seen([0.2 * scale, 0.6 * scale], kind) == [51, 153]


@pytest.mark.parametrize("scale", [1, 255, 65535])
def test_floats_that_do_not_fill_a_scale_are_stretched(scale: int) -> None:
    assert seen([0.125 * scale, 0.25 * scale, 0.375 * scale]) == [0, 128, 255]
    assert seen([0, 0.5 * scale]) == [0, 255]


@pytest.mark.parametrize(
    ("scale", "kind"), [(1, "f4"), (1, "f8"), (255, "f4"), (65535, "f4"), (255, "i4"), (65535, "u4")]
)
def test_one_value_just_above_a_scale_changes_next_to_nothing(scale: int, kind: str) -> None:
    values = np.linspace(0, scale, 50)
    above = [*values[:-1], scale * 1.0001 if kind[0] == "f" else scale + 1]

    assert np.abs(np.array(seen(above, kind)) - np.array(seen(values, kind))).max() <= 1


def test_one_value_just_below_zero_changes_next_to_nothing() -> None:
    values = np.linspace(0, 1, 50)

    assert np.abs(np.array(seen([-0.001, *values[1:]])) - np.array(seen(values))).max() <= 1


def test_numbers_over_all_of_their_type_do_not_wrap() -> None:
    assert seen([0, 2**30, 2**31, 3 * 2**30, 2**32 - 1], "u4") == [0, 64, 128, 191, 255]
    assert seen([2**31 + 1, 2**31 + 2, 2**31 + 3], "u4") == [0, 128, 255]  # which no float32 could tell apart
    assert seen([-(2**31), 0, 2**31 - 1], "i4") == [0, 128, 255]
    assert seen([-(2**15), 0, 2**15 - 1], "i2") == [0, 128, 255]
    assert seen([-128, -1, 127], "i1") == [0, 127, 255]
    assert seen([-3e38, 0, 3e38]) == [0, 128, 255]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        *((0, "f4", 0), (0.5, "f4", 128), (1, "f4", 255), (51, "f4", 51), (1e9, "f4", 255), (-2, "f4", 0)),
        *((NAN, "f4", 0), (0, "i4", 0), (51, "i4", 51), (10**6, "i4", 255), (-5, "i4", 0), (2**32 - 1, "u4", 255)),
    ],
)
def test_a_constant_image_is_where_its_value_is_on_the_first_scale_that_holds_it(
    value: float, kind: str, expected: int
) -> None:
    assert seen([value] * 4, kind) == [expected] * 4


def test_nan_is_zero_and_infinities_are_the_ends_and_none_has_a_say_in_the_scale() -> None:
    assert seen([0, 0.5, 1, NAN, INF, -INF]) == [0, 128, 255, 0, 255, 0]
    assert seen([-100, 0, 100, NAN, INF, -INF]) == [0, 128, 255, 128, 255, 0]
    assert seen([1000, 2000, 3000, NAN, INF, -INF]) == [0, 128, 255, 0, 255, 0]
    assert seen([NAN, INF, -INF]) == [0, 255, 0]


@pytest.mark.parametrize(
    ("values", "kind"), [([0, 257, 65535], "u2"), ([0, 0.5, 1], "f4"), ([0, 1, 3 * 2**30], "u4"), ([-9, 0, 9], "i2")]
)
def test_white_as_zero_is_the_negative_of_black_as_zero(values: list[float], kind: str) -> None:
    assert seen(values, kind, photometric="miniswhite") == [255 - level for level in seen(values, kind)]


def test_float64_of_less_spread_than_float32_can_hold_is_refused() -> None:
    """Pillow has no float64."""
    assert seen([2**30, 2**30 + 2**15, 2**30 + 2**16], "f8") == [0, 128, 255]
    with pytest.raises(InvalidImage, match=r"TIFF of 64-bit numbers from 1.07374e\+09 to 1.07374e\+09"):
        seen([2**30, 2**30 + 2**8, 2**30 + 2**10], "f8")


def test_a_brighter_value_never_looks_darker() -> None:
    for top in (0.3, 0.5, 0.7, 1, 1.5, 100, 200, 300, 1e5):
        levels = seen(np.linspace(0, top, 300))
        assert all(a <= b for a, b in pairwise(levels))
        assert levels[-1] >= 127


def twelve_bits(order: bytes, photometric: int, deflated: bool) -> bytes:
    """Eight values from 0 to 4095, in two rows."""
    bits = "".join(f"{value:012b}" for value in (0, 585, 1170, 1755, 2340, 2925, 3510, 4095)) * 2
    strip = int(bits, 2).to_bytes(24)
    strip = zlib.compress(strip) if deflated else strip
    sign = "<" if order == b"II" else ">"
    tags = [
        (256, 8),
        (257, 2),
        (258, 12),
        (259, 8 if deflated else 1),
        (262, photometric),
        (273, 122),
        (277, 1),
        (278, 2),
    ]
    entries = [struct.pack(sign + "HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(strip))]]
    head = order + struct.pack(sign + "HIH", 42, 8, len(entries)) + b"".join(entries) + bytes(4)
    return head + strip


@pytest.mark.parametrize("order", [b"II", b"MM"])
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("photometric", [0, 1])
def test_twelve_bits_are_a_scale_of_their_own(photometric: int, deflated: bool, order: bytes) -> None:
    levels = shown(twelve_bits(order, photometric, deflated), 8, 2)[0]

    expected = np.array([0, 36, 73, 109, 146, 182, 219, 255])
    assert np.abs(levels - (expected if photometric else 255 - expected)).max() <= 1


@pytest.mark.parametrize("divisor", [1, 257])
def test_a_palette_of_8_bits_is_as_bright_as_one_of_16(divisor: int) -> None:
    """The standard has 16; some writers leave it at 8."""
    colours = np.array([[0, 255], [40, 100], [90, 200]]) * (257 // divisor)
    colours = np.pad(colours, ((0, 0), (0, 254)))
    pixels = np.array([[0, 1], [1, 0]], np.uint8)
    tifffile.imwrite(buffer := io.BytesIO(), pixels, photometric="palette", colormap=colours.astype(np.uint16))

    image = decode(buffer.getvalue(), Geometry(2, 2, 1.0, "bilinear"), max_pixels=10).pixels

    assert image[0].tolist() == [[0, 40, 90], [255, 100, 200]]


def test_a_sixteen_bit_png_keeps_its_scale_however_dark() -> None:
    values = np.array([[0, 257, 514, 4096]] * 2, np.uint16)
    Image.fromarray(values).save(buffer := io.BytesIO(), "PNG")

    assert shown(buffer.getvalue(), 4, 2)[0].tolist() == [0, 1, 2, 16]
