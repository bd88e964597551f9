import io
from time import thread_time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.images.header import megapixels

SIDES = (600, 500)  # 0.3 megapixels


def encode(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(SIDES, 60).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode("PNG", "1"), 0.3),
        (encode("GIF", "P"), 0.3),
        (encode("BMP"), 0.3),
        (encode("TIFF"), 0.3),
        (encode("TIFF", "1", compression="group4"), 0.3),
        (encode("AVIF", speed=10), 0.3),
        (encode("WEBP", method=0), 0.3),
        (encode("WEBP", lossless=True, method=0), 0.3),
        (encode("WEBP", "RGBA", method=0, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"), 0.3),
        (encode("JPEG", "L", quality=95), 0.075),
        (encode("JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff" * 5000), 0.3),
    ],
    ids=["png", "gif", "bmp", "tiff", "group4", "avif", "vp8", "vp8l", "vp8x", "jpeg", "progressive"],
)
def test_the_header_says_how_many_pixels_take_time(data: bytes, expected: float) -> None:
    assert megapixels(data) == expected


HEADS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF1234WEBPVP8", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x20ftypavif")


@given(st.sampled_from(HEADS), st.binary(max_size=200))
def test_any_bytes_have_some_number_and_raise_nothing(head: bytes, rest: bytes) -> None:
    assert megapixels(head + rest) >= 0


@pytest.mark.parametrize("filler", [b"\xff", b"\xff\xd0", b"\xff\xe1\0\2", b"\0", b"\xff\0"])
def test_no_jpeg_keeps_the_event_loop_busy(filler: bytes) -> None:
    data = b"\xff\xd8" + filler * (8_000_000 // len(filler))
    start = thread_time()
    megapixels(data)

    assert thread_time() - start < 0.2  # a loop over every byte takes seconds
