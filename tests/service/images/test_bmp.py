"""BMPs look as Windows shows them, whatever header, palette or alpha they have."""

import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidImage
from service.images.decoding import Geometry, decode
from tests.service.images.second_decoder import magick, written

WIDTH, HEIGHT = 37, 21
RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
MASKS = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
PALETTES = {
    "all greys": [(level,) * 3 for level in range(256)],
    "black and white": [(0, 0, 0), (255, 255, 255)],
    "white and black": [(255, 255, 255), (0, 0, 0)],
    "three colours": [(200, 30, 40), (1, 2, 3), (90, 180, 20)],
}


def bmp(
    bits: int,
    data: bytes,
    *,
    palette: bytes = b"",
    colours: int = 0,
    size: int = 40,
    masks: bytes = b"",
    method: int = 0,
) -> bytes:
    """`size` is the header's; `masks` say where the colours lie; `method` is the compression."""
    if size == 12:
        header = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
    else:
        method = 3 if masks else method
        header = struct.pack("<IiiHHIIiiII", size, WIDTH, HEIGHT, 1, bits, method, len(data), 2835, 2835, colours, 0)
        header += masks.ljust(size - 40, b"\0") if size > 40 else masks[:12]
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def rows(pixels: NDArray[np.uint8 | np.uint16]) -> bytes:
    """From the bottom up, each filled to four bytes."""
    return b"".join(row.tobytes() + bytes(-len(row.tobytes()) % 4) for row in pixels[::-1])


def packed(indices: NDArray[np.int64], bits: int) -> bytes:
    binary = (indices[..., np.newaxis] >> np.arange(bits)[::-1] & 1).reshape(HEIGHT, -1)
    return rows(np.packbits(binary.astype(np.uint8), axis=1))


def ours(data: bytes) -> NDArray[np.uint8]:
    return decode(data, Geometry(HEIGHT, WIDTH, 1.0, "bilinear"), max_pixels=10**4).pixels


@pytest.mark.parametrize("size", [12, 40, 124])
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("name", PALETTES)
def test_indices_are_looked_up_in_the_palette_whatever_its_colours(name: str, bits: int, size: int) -> None:
    palette = PALETTES[name][: 2**bits]
    if size == 12:  # a header that can't say how many there are
        palette += [(0, 0, 0)] * (2**bits - len(palette))
    indices = RANDOM.integers(0, len(palette), (HEIGHT, WIDTH))
    entries = b"".join(bytes(colour[::-1]) + b"\0" * (size != 12) for colour in palette)
    data = bmp(bits, packed(indices, bits), palette=entries, colours=len(palette), size=size)

    seen = ours(data)

    assert np.array_equal(seen, np.array(palette)[indices])
    assert np.array_equal(seen, magick(data, "bmp"))


@pytest.mark.parametrize("size", [56, 108, 124])
def test_an_alpha_that_is_zero_everywhere_is_none(size: int) -> None:
    data = bmp(32, rows(np.dstack([COLOURS[..., ::-1], np.zeros((HEIGHT, WIDTH), np.uint8)])), size=size, masks=MASKS)

    seen = ours(data)

    assert np.array_equal(seen, COLOURS)
    assert np.array_equal(seen, magick(data, "bmp", "-alpha", "off"))


@pytest.mark.parametrize("lowest", [0, 1])
def test_any_other_alpha_lies_on_white(lowest: int) -> None:
    """One pixel that can be seen, however little, makes it an alpha."""
    alpha = np.full((HEIGHT, WIDTH), lowest, np.uint8)
    alpha[0, 0], alpha[:, 9:] = 1, 200
    data = bmp(32, rows(np.dstack([COLOURS[..., ::-1], alpha])), size=124, masks=MASKS)

    seen = ours(data).astype(int)

    assert np.abs(seen - magick(data, "bmp")).max() <= 1
    assert (seen[:, :9] >= 254).all()


@pytest.mark.parametrize(("size", "masks"), [(40, b""), (124, b""), (40, MASKS)])
def test_the_fourth_byte_is_no_alpha_where_the_header_does_not_say_so(size: int, masks: bytes) -> None:
    fourth = np.full((HEIGHT, WIDTH), 7, np.uint8)
    data = bmp(32, rows(np.dstack([COLOURS[..., ::-1], fourth])), size=size, masks=masks)

    assert np.array_equal(ours(data), COLOURS)


@pytest.mark.parametrize("size", [40, 56, 124])
def test_an_alpha_of_one_bit_is_one_where_the_header_has_a_mask_for_it(size: int) -> None:
    """ImageMagick reads the colours, and takes a set bit for half of alpha: the truth is the bit."""
    pixels = RANDOM.integers(0, 2**16, (HEIGHT, WIDTH), dtype=np.uint16)
    data = bmp(16, rows(pixels), size=size, masks=struct.pack("<4I", 0x7C00, 0x3E0, 0x1F, 0x8000))

    colours = magick(data, "bmp", "-alpha", "off").astype(int)
    if size > 40:
        colours[pixels < 2**15] = 255

    assert np.abs(ours(data) - colours).max() <= 1


@pytest.mark.parametrize("kind", ["RGB565", "RGB555"])
def test_colours_of_5_and_6_bits_are_what_imagemagick_reads(kind: str) -> None:
    data = written(Image.fromarray(COLOURS), "bmp", "-define", f"bmp:subtype={kind}")

    assert data[28] == 16
    assert np.abs(ours(data).astype(int) - magick(data, "bmp")).max() <= 1


INDICES = RANDOM.integers(0, 5, (HEIGHT, WIDTH))
INDICES[3:5] = INDICES[10, 20:] = INDICES[15:19] = 0
GREYS_AND_MORE = RANDOM.integers(0, 256, (16, 3), dtype=np.uint8)


def runs(bits: int, row: NDArray[np.int64], plain: bool) -> bytes:
    """Six pixels at a time, or each by itself."""
    packed = b""
    for x in range(0, len(row), 6 if plain else 1):
        piece = row[x : x + (6 if plain else 1)].tolist()
        if len(piece) < 3:  # too few to be plain
            packed += b"".join(bytes((1, value if bits == 8 else value << 4)) for value in piece)
            continue
        halves = [*piece, 0][: len(piece) + len(piece) % 2]
        data = bytes(piece) if bits == 8 else bytes(a << 4 | b for a, b in zip(halves[::2], halves[1::2], strict=True))
        packed += bytes((0, len(piece))) + data + bytes(len(data) % 2)
    return packed


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("how", ["whole rows", "short and empty rows", "jumps"])
def test_run_lengths_are_what_imagemagick_reads(how: str, bits: int, plain: bool) -> None:
    packed = b""
    for y in range(HEIGHT)[::-1]:
        row, end = INDICES[y], b"\0\0"
        if how != "whole rows":
            row = row[:20] if y == 10 else row[: WIDTH * bool(row.any())]
        if how == "jumps" and y in range(15, 19):
            row, end = row[:0], b"\0\2\0\4" if y == 18 else b""
        packed += runs(bits, row, plain) + end
    palette = b"".join(bytes(colour) + b"\0" for colour in GREYS_AND_MORE)
    data = bmp(bits, packed + b"\0\1", palette=palette, colours=16, method=1 if bits == 8 else 2)

    assert np.array_equal(ours(data), GREYS_AND_MORE[:, ::-1][INDICES])
    assert np.array_equal(ours(data), magick(data, "bmp"))
    assert np.array_equal(ours(data[:-4]), ours(data))
    for missing in (5, 50, len(packed) // 2):
        for end in (b"", b"\0\1"):
            with pytest.raises(InvalidImage, match="truncated BMP"):
                ours(data[: -missing - missing % 2] + end)


def test_an_image_of_many_runs_is_read() -> None:
    side = 300
    row = b"\1\1\1\2" * (side // 2) + b"\0\0"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 3, 0)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 66) + header + bytes((0, 0, 0, 0, 10, 20, 30, 0, 40, 50, 60, 0))

    seen = decode(data + row * side + b"\0\1", Geometry(side, side, 1.0, "bilinear"), max_pixels=10**5).pixels

    assert (seen[:, ::2] == (30, 20, 10)).all()
    assert (seen[:, 1::2] == (60, 50, 40)).all()


def test_run_lengths_that_lead_nowhere_are_given_up() -> None:
    data = bmp(8, b"\0\2\0\0" * 2**19, palette=bytes(12), colours=3, method=1)

    with pytest.raises(InvalidImage, match="too many runs"):
        ours(data)


@pytest.mark.parametrize(
    "data",
    [
        bmp(16, rows(COLOURS[..., :1].astype(np.uint16)), masks=struct.pack("<3I", 0xF00, 0xF0, 0xF)),
        bmp(32, bytes(4 * WIDTH * HEIGHT), masks=struct.pack("<3I", 0x3FF << 20, 0x3FF << 10, 0x3FF)),
        bmp(24, rows(COLOURS), method=4),
        bmp(5, rows(COLOURS)),
        bmp(16, rows(COLOURS[..., :1].astype(np.uint16)), method=3),
        written(Image.fromarray(COLOURS), "bmp3", "-define", "bmp:subtype=RGB565"),  # without its masks
    ],
    ids=["masks of 4 bits", "masks of 10 bits", "a JPEG inside", "5 bits", "no masks", "ImageMagick's"],
)
def test_a_form_that_is_not_read_is_no_fault_of_the_file(data: bytes) -> None:
    with pytest.raises(InvalidImage, match=r"not a supported image \(BMP: unsupported bmp .*\); save it with 24 bits"):
        ours(data)
