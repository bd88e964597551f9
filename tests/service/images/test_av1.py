"""AVIFs whose header says something else of their frame than the frame's own; libavif, through Pillow, is the truth."""

import io
import struct
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from PIL import AvifImagePlugin, Image

from service.errors import InvalidImage
from service.images.av1 import check_frames
from service.images.decoding import decode
from service.images.geometry import Geometry

GEOMETRY = Geometry(64, 64, 0.9, "bicubic")
pytestmark = pytest.mark.skipif(not AvifImagePlugin.SUPPORTED, reason="this Pillow has no AVIF")


def avif(size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    gradient = Image.linear_gradient("L").resize(size).convert(mode)
    if mode == "RGBA":
        gradient.putalpha(Image.radial_gradient("L").resize(size))
    gradient.save(out, "AVIF", speed=10, **options)
    return out.getvalue()


def claiming(data: bytes, width: int, height: int) -> bytes:
    """`data` with that size in each of its headers but the frames' own."""
    at = data.find(b"ispe")
    while at >= 0:
        data = data[: at + 8] + struct.pack(">II", width, height) + data[at + 16 :]
        at = data.find(b"ispe", at + 4)
    return data


def outcome(data: bytes) -> str:
    with suppress(InvalidImage):
        check_frames(data, 64, 48)
        return "sound"
    return "refused"


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (333, 77), (77, 1030)])
@pytest.mark.parametrize("options", [{}, {"mode": "RGBA"}, {"subsampling": "4:4:4"}], ids=["plain", "alpha", "444"])
def test_a_sound_file_has_frames_of_the_size_that_its_header_says(size: tuple[int, int], options: Any) -> None:
    data = avif(size, **options)

    check_frames(data, *size)
    with pytest.raises(InvalidImage, match=f"{size[0]}x{size[1]} pixels"):
        check_frames(data, size[0], size[1] - 1)


def test_a_frame_larger_than_the_header_says_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    lying = claiming(avif((900, 600)), 30, 20)
    with Image.open(io.BytesIO(lying)) as image:
        assert image.size == (30, 20)  # so much the decoder says beforehand

    monkeypatch.setattr("service.images.formats._ONE_AT_A_TIME", None)  # which decoding would enter
    with pytest.raises(InvalidImage, match="frame has 900x600 pixels, and its header says 30x20"):
        decode(lying, GEOMETRY, max_pixels=10**6)


def test_an_animation_is_judged_by_its_first_frame() -> None:
    frames = [Image.new("RGB", (120, 90), colour) for colour in ("red", "green", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "AVIF", save_all=True, append_images=frames[1:])

    check_frames(out.getvalue(), 120, 90)
    with pytest.raises(InvalidImage, match="120x90 pixels"):
        check_frames(out.getvalue(), 120, 89)


def test_whatever_is_cut_or_changed_is_either_sound_or_refused() -> None:
    data, outcomes = avif((64, 48)), Counter[str]()

    for at in range(len(data)):
        for changed in (data[:at], data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]):
            outcomes[outcome(changed)] += 1

    assert {*outcomes} == {"sound", "refused"}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\0\0\0\x08moov" * 100_000, id="nested"),
        pytest.param(b"\0\0\0\x08free" * 100_000, id="many boxes"),
        pytest.param(b"\0\0\0\x0cmeta\0\0\0\0" * 100_000, id="many headers"),
    ],
)
def test_a_file_of_endless_boxes_is_refused_soon(data: bytes) -> None:
    assert outcome(data) == "refused"


@pytest.mark.parametrize("data", [b"", b"\0\0\0\x20ftypavif", b"\0\0\0\0meta\0\0\0\0", b"\xff" * 200])
def test_a_file_without_a_frame_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidImage, match="AVIF"):
        check_frames(data, 1, 1)
