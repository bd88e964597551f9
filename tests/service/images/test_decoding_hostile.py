"""Whatever the bytes: an answer, or one of our own errors, within a second."""

import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.errors import ImageTooLarge, InvalidImage, MemoryExhausted
from service.images.decoding import FORMATS, Geometry, decode

GEOMETRY = Geometry(224, 224, 0.9, "bicubic")
PIXELS = 20_000_000
MANY = 4_000_000  # bytes
SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
FRAME = SMALL.crop((0, 0, 16, 12))


def encode(kind: str, image: Image.Image = SMALL, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, size: tuple[int, int] = (64, 48)) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + VALID["PNG"][33:]


def tiff(*entries: tuple[int, int, int, int], body: bytes = b"", width: int = 64, following: int = 0) -> bytes:
    entries = ((256, 4, 1, width), (257, 4, 1, width), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), *entries)
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", following) + body


def gif(screen: int, frame: int) -> bytes:
    block = b"\x21\xf9\x04" + bytes([2 << 2, 0, 0, 0, 0]) + b"," + struct.pack("<HHHH", 0, 0, frame, frame)
    return b"GIF89a" + struct.pack("<HH", screen, screen) + b"\x80\0\0" + bytes(6) + block + b"\0\x02\x02\x44\x01\0;"


def scans(count: int) -> bytes:
    image = encode("JPEG", Image.new("RGB", (4000, 4000)), progressive=True)
    last = image.rfind(b"\xff\xda")
    return image[:-2] + image[last:-2] * count + b"\xff\xd9"


VALID = {
    **{kind: encode(kind) for kind in FORMATS},
    "GIF, animated": encode("GIF", save_all=True, append_images=[SMALL.rotate(90)]),
    "PNG, animated": encode("PNG", save_all=True, append_images=[SMALL.rotate(90)]),
    "PNG, palette": encode("PNG", SMALL.quantize(16)),
    "JPEG, progressive": encode("JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0"),
    **{
        f"TIFF, {method}": encode("TIFF", compression=method) for method in ("tiff_lzw", "tiff_deflate", "jpeg", "zstd")
    },
}
MEGABYTE = zlib.compress(bytes(2**20 - 10), 9)
BOMB = zlib.compress(bytes(10**8), 9)


def outcome(data: bytes) -> str:
    """What `decode` makes of `data`: "" for an image, or the sentence of one of our errors."""
    started, sentence = time.process_time(), ""
    try:
        decode(data, GEOMETRY, max_pixels=PIXELS)
    except (InvalidImage, ImageTooLarge) as error:
        sentence = str(error)
        assert sentence
        assert "BytesIO" not in sentence
    assert time.process_time() - started < 2  # a second of the processor, and another for slower ones
    return sentence


@pytest.mark.parametrize("kind", VALID)
def test_a_file_cut_anywhere_is_an_image_or_invalid(kind: str) -> None:
    data = VALID[kind]

    sentences = [outcome(data[:end]) for end in {*range(64), *range(0, len(data), len(data) // 40)}]

    assert any("truncated" in sentence or "corrupt" in sentence for sentence in sentences)


@pytest.mark.parametrize("kind", VALID)
def test_a_file_with_changed_bytes_is_an_image_or_one_of_our_errors(kind: str) -> None:
    rng = random.Random(kind)  # noqa: S311 - the same mutations in each run
    for _ in range(150):
        data = bytearray(VALID[kind])
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(rng.choice((64, 256, len(data)))) % len(data)
            data[at] = rng.choice((0, 1, 255, 128, data[at] ^ (1 << rng.randrange(8))))

        outcome(bytes(data))


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([b"", *(data[:40] for data in VALID.values())]), rest=st.binary(max_size=400))
def test_random_bytes_are_no_foreign_error(start: bytes, rest: bytes) -> None:
    outcome(start + rest)


def test_emptiness_is_named() -> None:
    assert outcome(b"").startswith("empty")


@pytest.mark.parametrize(
    "data",
    [b"hello", b"\x00\x05\x16\x07", bytes(40), b"\x89PN", b"BX" + bytes(60)],
)
def test_other_formats_are_refused_by_a_list_of_ours(data: bytes) -> None:
    assert outcome(data) == f"not a supported image ({', '.join(FORMATS)})"


def test_a_truncated_jpeg_says_so() -> None:
    with pytest.raises(InvalidImage, match="truncated JPEG: ") as caught:
        decode(VALID["JPEG"][:-200], GEOMETRY, max_pixels=PIXELS)

    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("kind", FORMATS)
def test_too_many_pixels_are_named_with_their_setting(kind: str) -> None:
    sentence = "the image has 0.003072 megapixels, the limit is 0.003071 (PVT_MAX_IMAGE_MEGAPIXELS)"

    with pytest.raises(ImageTooLarge) as caught:
        decode(VALID[kind], GEOMETRY, max_pixels=64 * 48 - 1)

    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"IDAT", BOMB), size=(65535, 65535)),
        png(chunk(b"IDAT", BOMB), size=(10_000, 10_000)),
        png(size=(1, 2**31 - 1)),
        gif(65535, 5),
        gif(5, 65535),
        gif(5, 13000),
        tiff((273, 4, 1, 8), width=65535),
        b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0) + bytes(24),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_absurd_sizes_are_refused_by_the_header(data: bytes) -> None:
    sentence = outcome(data)

    assert "megapixels, the limit is 20 (PVT_MAX_IMAGE_MEGAPIXELS)" in sentence


@pytest.mark.parametrize("data", [png(size=(0, 5)), png(size=(5, 0)), gif(0, 0), tiff((273, 4, 1, 8), width=0)])
def test_images_without_pixels_are_invalid(data: bytes) -> None:
    assert outcome(data)


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"zTXt", b"a\0\0" + BOMB)),
        png(chunk(b"iCCP", b"a\0\0" + BOMB)),
        png(chunk(b"zTXt", b"a\0\0" + MEGABYTE) * 2000),
        png(chunk(b"iCCP", b"a\0\0" + MEGABYTE) * 2000),
        png(chunk(b"abCd", b"") * (MANY // 12)),
        b"\xff\xd8" + b"\xff" * MANY,
        b"\xff\xd8" + b"\xff\xe5\0\2" * (MANY // 4) + VALID["JPEG"][2:],
        b"\xff\xd8" + b"\xff\xe1\0\x08Exif\0\0" * (MANY // 10) + VALID["JPEG"][2:],
        scans(1000),
        b"GIF89a\5\0\5\0\0\0\0\x21\xfe" + b"\1a" * (MANY // 2),
        b"GIF89a\5\0\5\0\0\0\0,\0\0\0\0\5\0\5\0\0\2" + b"\1a" * (MANY // 2),
        tiff((273, 4, MANY // 4, 86), body=bytes(MANY)),
        tiff((273, 1, MANY, 86), body=bytes(MANY)),
        tiff((273, 4, 1, 8), (282, 5, MANY // 8, 98), body=bytes(MANY)),
        tiff(*((tag, 1, MANY, 8) for tag in range(1000, 60000)), body=bytes(MANY)),
        b"II\x2b\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63) + bytes(MANY),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_costly_headers_are_refused_at_once(data: bytes) -> None:
    assert outcome(data)


@pytest.mark.parametrize(
    "data",
    [
        tiff((273, 4, 1, 8), body=bytes(4096), following=8),
        tiff((273, 4, 1, 8), (34665, 4, 1, 98), body=struct.pack("<HHHII", 1, 282, 5, MANY // 8, 120) + bytes(MANY)),
        VALID["PNG"][:-12] + chunk(b"abCd", b"") * (MANY // 12) + VALID["PNG"][-12:],
        *(encode(kind, FRAME, save_all=True, append_images=[FRAME] * 300) for kind in ("GIF", "PNG", "TIFF")),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_loops_and_crowds_behind_the_first_frame_do_not_matter(data: bytes) -> None:
    assert not outcome(data)


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II" * 40, b"II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP"])
def test_a_broken_exif_block_fails_no_image(kind: str, exif: bytes) -> None:
    assert not outcome(encode(kind, exif=b"Exif\0\0" + exif))


def test_missing_memory_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.Image.core.new", fail)

    with pytest.raises(MemoryExhausted, match="memory"):
        decode(VALID["PNG"], GEOMETRY, max_pixels=PIXELS)
