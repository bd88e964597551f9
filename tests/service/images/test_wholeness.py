"""All pixels there: answered. Some missing: refused, whatever the file says of its end."""

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, TiffImagePlugin
from sklearn.datasets import load_sample_images

from service.errors import InvalidImage
from service.images.decoding import FORMATS, Geometry, decode
from tests.service.images.second_decoder import saved

PHOTO = Image.fromarray(load_sample_images().images[0]).resize((160, 107), Image.Resampling.BICUBIC)
END = b"\xff\xd9"
SCAN = b"\xff\xda"
JPEGS = {
    "baseline": saved(PHOTO, "JPEG"),
    "progressive": saved(PHOTO, "JPEG", progressive=True),
    "grey": saved(PHOTO.convert("L"), "JPEG"),
    "CMYK": saved(PHOTO.convert("CMYK"), "JPEG"),
    "with restarts": saved(PHOTO, "JPEG", restart_marker_blocks=3),
    "optimised": saved(PHOTO, "JPEG", optimize=True, subsampling="4:4:4"),
}


def fault(data: bytes, side: int = 64) -> str:
    """Why it is refused; empty when it is answered."""
    try:
        decode(data, Geometry(side, side, 0.9, "bicubic"), max_pixels=10**6)
    except InvalidImage as error:
        return str(error)
    return ""


def pixels(data: bytes) -> Any:
    return decode(data, Geometry(64, 64, 0.9, "bicubic"), max_pixels=10**6).pixels


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("side", [16, 64])  # decoded at a quarter of its sides, and in full
def test_a_jpeg_cut_anywhere_is_refused_with_and_without_an_end_marker(name: str, side: int) -> None:
    data = JPEGS[name]
    start = data.index(SCAN) + 14
    ends = [*range(len(data) - 12, len(data) - 2), *range(start, len(data) - 12, (len(data) - start) // 19)]

    for end in ends:
        for closing in (b"", END, END + bytes(100)):
            assert "truncated" in fault(data[:end] + closing, side), (end, closing)


@pytest.mark.parametrize("name", JPEGS)
def test_a_whole_jpeg_without_its_end_marker_is_the_same_image(name: str) -> None:
    data = JPEGS[name]

    assert np.array_equal(pixels(data[:-2]), pixels(data))
    assert np.array_equal(pixels(data[:-1]), pixels(data))


@pytest.mark.parametrize("name", JPEGS)
def test_bytes_that_no_pixel_needs_do_no_harm(name: str) -> None:
    data = JPEGS[name]
    table = data.index(b"\xff\xdb")

    for other in (
        data + b"trailing bytes",
        data + JPEGS["baseline"],
        data[:-2] + b"\0\0\0" + END,
        data[:table] + b"\0\0\0" + data[table:],
        data[:table] + b"\xff\xff" + data[table:],
        data[:table] + b"\xff\xfe\0\x06\xff\xd9\xff\xda" + data[table:],  # a comment that looks like markers
        data.replace(b"JFIF\0\x01", b"JFIF\0\x07"),  # of an unknown revision
    ):
        assert np.array_equal(pixels(other), pixels(data))


def test_a_cut_is_found_behind_other_oddities() -> None:
    """libjpeg stops at its first complaint, so that others are looked for in another way."""
    data = JPEGS["baseline"].replace(b"JFIF\0\x01", b"JFIF\0\x07")

    assert not fault(data)
    for share in (0.3, 0.6, 0.9, 0.99):
        assert "truncated" in fault(data[: int(len(data) * share)] + END)


def test_a_progressive_jpeg_without_its_last_scans_is_refused() -> None:
    data = JPEGS["progressive"]
    scans = [found.start() for found in re.finditer(SCAN, data)]

    for scan in scans[1:]:
        assert fault(data[:scan] + END) == "truncated JPEG: its last scans are missing"


def scanned_by_component() -> bytes:
    """A baseline JPEG of one scan for each component, made of three grey ones."""
    planes = [saved(plane, "JPEG") for plane in PHOTO.convert("YCbCr").split()]
    frame = planes[0].index(b"\xff\xc0")
    end = frame + 2 + int.from_bytes(planes[0][frame + 2 : frame + 4])
    components = b"".join(bytes((number, 0x11, 0)) for number in (1, 2, 3))
    merged = planes[0][:frame] + b"\xff\xc0\0\x11" + planes[0][frame + 4 : frame + 9] + b"\x03" + components
    first = planes[0].index(SCAN)
    scans = [plane[plane.index(SCAN) + 10 : -2] for plane in planes]
    headers = [SCAN + b"\0\x08\x01" + bytes((number, 0, 0, 63, 0)) for number in (1, 2, 3)]
    body = b"".join(header + scan for header, scan in zip(headers, scans, strict=True))
    return merged + planes[0][end:first] + body + END


def test_every_component_must_have_its_scan() -> None:
    data = scanned_by_component()
    scans = [found.start() for found in re.finditer(SCAN, data)]

    assert np.abs(pixels(data).astype(int) - pixels(JPEGS["optimised"])).mean() < 6
    assert not fault(data[:-2])
    for scan in scans[1:]:
        assert fault(data[:scan] + END) == "truncated JPEG: its last scans are missing"
    assert "truncated" in fault(data[:-40] + END)


def test_damaged_data_is_not_shown() -> None:
    data = JPEGS["with restarts"]
    restarts = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", data)]

    lost = data[: restarts[2]] + data[restarts[5] :]

    assert "corrupt JPEG: " in fault(lost)


def test_arithmetic_coding_is_refused_for_it_does_not_show_what_is_missing() -> None:
    data = JPEGS["baseline"].replace(b"\xff\xc0", b"\xff\xc9", 1)

    assert fault(data).startswith("not a supported image (JPEG with arithmetic coding)")


def test_subsampling_that_only_pillow_reads_is_checked_too() -> None:
    """Three to one: simplejpeg knows no such layout. 17 blocks of 24 pixels, four components' blocks in each."""
    data = odd_subsampling()

    assert not fault(data)
    assert not fault(data[:-2])
    for share in (0.5, 0.8, 0.95):
        assert "truncated" in fault(data[: int(len(data) * share)] + END)


def odd_subsampling() -> bytes:
    """A JPEG whose components are of factors 3x1, 1x1 and 1x1: its blocks are those of a 4:1:1 one, three of four."""
    grey = saved(Image.new("L", (24 * 17, 8 * 5), 90), "JPEG")
    frame, scan = grey.index(b"\xff\xc0"), grey.index(SCAN)
    end = frame + 2 + int.from_bytes(grey[frame + 2 : frame + 4])
    components = bytes((1, 0x31, 0, 2, 0x11, 0, 3, 0x11, 0))
    header = grey[:frame] + b"\xff\xc0\0\x11" + grey[frame + 4 : frame + 9] + b"\x03" + components
    blocks = "".join("00" + "1010" for _ in range(17 * 5 * 5))  # each a difference of zero and an end of block
    bits = blocks + "1" * (-len(blocks) % 8)
    return (
        header
        + grey[end:scan]
        + SCAN
        + b"\0\x0c\x03\x01\0\x02\0\x03\0\0\x3f\0"
        + bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
        + END
    )


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(stream: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", *PHOTO.size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


ROWS = b"".join(b"\0" + row.tobytes() for row in np.asarray(PHOTO))


def test_a_png_needs_its_rows_and_not_its_end() -> None:
    packed = zlib.compress(ROWS)

    assert not fault(png(packed))
    assert not fault(png(packed)[:-12])
    for stream in (zlib.compress(ROWS[:-1]), zlib.compress(ROWS[: len(ROWS) // 2]), packed[: len(packed) // 2]):
        assert "truncated PNG" in fault(png(stream))


def test_a_gif_needs_its_pixels_and_not_its_end() -> None:
    data = saved(PHOTO.quantize(64), "GIF")
    with Image.open(io.BytesIO(data)) as image:
        start, position, packed = image.tile[0].offset, image.tile[0].offset, b""
    while data[position]:
        packed += data[position + 1 : position + 1 + data[position]]
        position += 1 + data[position]

    def gif(packed: bytes) -> bytes:
        blocks = (packed[at : at + 255] for at in range(0, len(packed), 255))
        return data[:start] + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0;"

    assert not fault(gif(packed))
    assert not fault(data[:-1])
    for missing in (3, 10, len(packed) // 2):  # the last two bytes hold the code of the end
        assert "truncated GIF" in fault(gif(packed[:-missing]))


def test_a_pngs_chunks_behind_its_pixels_may_be_cut() -> None:
    data = png(zlib.compress(ROWS))
    data = data[:-12] + chunk(b"tEXt", b"Comment\0" + b"x" * 50) + chunk(b"zzZz", b"y" * 50) + data[-12:]

    for missing in range(1, 150):
        assert not fault(data[:-missing])


def test_an_animated_gif_needs_the_pixels_of_its_first_frame_and_no_others() -> None:
    """Whose next frame Pillow would take for them."""
    first, second = PHOTO.quantize(64), PHOTO.rotate(180).quantize(64)
    data = saved(first, "GIF", save_all=True, append_images=[second, first])
    with Image.open(io.BytesIO(data)) as image:
        start = end = image.tile[0].offset
    blocks = []
    while data[end]:
        blocks.append(data[end + 1 : end + 1 + data[end]])
        end += 1 + data[end]
    for missing in (3, 10, 100):
        packed = b"".join(blocks)[:-missing]
        cut = b"".join(
            bytes([len(block)]) + block for block in (packed[i : i + 255] for i in range(0, len(packed), 255))
        )
        assert "truncated GIF" in fault(data[:start] + cut + data[end:])
    for missing in (0, 100, len(data) - end):
        assert not fault(data[: len(data) - missing])


def test_a_webp_needs_no_chunks_behind_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description" * 9
    still = saved(PHOTO, "WebP", exif=exif)
    moving = saved(PHOTO, "WebP", save_all=True, append_images=[PHOTO.rotate(180)])
    second = moving.rindex(b"ANMF")

    for missing in (1, 9, 70):
        assert np.array_equal(pixels(still[:-missing]), pixels(still))
    for end in (second, second + 5, (second + len(moving)) // 2, len(moving) - 1):
        assert np.array_equal(pixels(moving[:end]), pixels(moving))
    for data, end in ((still, still.rindex(b"EXIF")), (moving, second)):
        for missing in (2, 20, end // 2, end - 31):
            assert "WebP" in fault(data[: end - missing])


@pytest.mark.parametrize("options", [{}, {"lossless": True}])
def test_a_webp_needs_its_pixels(options: dict[str, Any]) -> None:
    data = saved(PHOTO, "WebP", **options)

    for missing in (20, len(data) // 4 * 2, len(data) // 8 * 6):
        cut = data[:-missing]
        sized = cut[:4] + struct.pack("<I", len(cut) - 8) + cut[8:16] + struct.pack("<I", len(cut) - 20) + cut[20:]
        assert "WebP" in fault(cut)
        assert "WebP" in fault(sized)


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF")
def test_an_avif_needs_its_pixels() -> None:
    data = saved(PHOTO, "AVIF")

    assert not fault(data)
    for missing in (1, 20, len(data) // 2):
        assert "AVIF" in fault(data[:-missing])


def test_a_bmp_needs_its_rows() -> None:
    data = saved(PHOTO, "BMP")

    assert not fault(data)
    for missing in (4, len(data) // 2):
        assert "truncated BMP" in fault(data[:-missing])


@pytest.mark.parametrize("method", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "jpeg"])
def test_a_tiff_needs_its_strips(method: str) -> None:
    """Cut by what its directory says of its only strip, and by the file, whose directory stands before it."""
    data = saved(PHOTO, "TIFF", compression=method)
    with Image.open(io.BytesIO(data)) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        (start,), (count,) = image.tag_v2[273], image.tag_v2[279]
    entry = data.rindex(struct.pack("<HHII", 279, 4, 1, count)) + 8

    assert not fault(data)
    for missing in (20, count // 2, count - 4):
        kept = data[: start + count - missing]
        if entry < start:
            assert "TIFF" in fault(kept)
        sized = data[:entry] + struct.pack("<I", count - missing) + data[entry + 4 :]
        blank = sized[: start + count - missing] + bytes(missing) + sized[start + count :]
        assert method == "raw" or "TIFF" in fault(blank)


@pytest.mark.parametrize("layout", ["strips", "tiles", "planes"])
def test_an_uncompressed_tiff_needs_all_its_strips_and_tiles(layout: str) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "strips": {"rowsperstrip": 10},
        "tiles": {"tile": (32, 32)},
        "planes": {"planarconfig": "separate"},
    }
    rgb = np.asarray(PHOTO)
    rgb = rgb if layout != "planes" else np.ascontiguousarray(rgb.transpose(2, 0, 1))
    tifffile.imwrite(buffer := io.BytesIO(), rgb, photometric="rgb", **layouts[layout])
    data, tag = buffer.getvalue(), 324 if layout == "tiles" else 273
    with tifffile.TiffFile(io.BytesIO(data)) as read:
        offsets = read.pages[0].tags[tag]  # type: ignore[union-attr]
    count, size = offsets.offset + 4, {3: 2, 4: 4}[offsets.dtype]

    assert not fault(data)
    fewer = data[:count] + struct.pack("<I", offsets.count - 1) + data[count + 4 :]
    last = offsets.valueoffset + size * (offsets.count - 1)
    none = data[:last] + bytes(size) + data[last + size :]
    for cut in (fewer, none):
        assert fault(cut).startswith(f"truncated TIFF: 1 of its {offsets.count} ")


def test_a_tiff_of_jpegs_with_end_markers_too_early_is_refused() -> None:
    data = saved(PHOTO, "TIFF", compression="jpeg")
    with Image.open(io.BytesIO(data)) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        (start,), (count,) = image.tag_v2[273], image.tag_v2[279]
    half = start + count // 2

    assert "truncated TIFF" in fault(data[:half] + END + bytes(start + count - half - 2) + data[start + count :])
