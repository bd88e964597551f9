"""What is not read is called by its name, with what to do; never "corrupt"."""

import base64
import bz2
import gzip
import io
import lzma
import struct
from time import process_time
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, TiffImagePlugin

from service.errors import InvalidImage
from service.images import kinds
from service.images.decoding import Geometry, decode
from tests.service.images.second_decoder import saved, written
from tests.service.images.test_wholeness import PHOTO


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidImage) as caught:
        decode(data, Geometry(64, 64, 0.9, "bicubic"), max_pixels=10**6)
    return str(caught.value)


def by_pillow(kind: str, **options: Any) -> bytes:
    PHOTO.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (by_pillow("JPEG2000"), "JPEG 2000; convert it"),
        (by_pillow("JPEG2000", no_jp2=True), "JPEG 2000; convert it"),
        (by_pillow("PPM"), "PNM; convert it"),
        (by_pillow("ICO"), "icon or cursor; convert it"),
        (by_pillow("PDF"), "PDF; render"),
        (by_pillow("EPS"), "PostScript; render"),
        (by_pillow("DDS"), "DDS; convert it"),
        (b"\xff\x0a\xfa\x1f\x01", "JPEG XL; convert it"),
        (b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a", "JPEG XL; convert it"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "camera raw: CR3; send a rendered image"),
        (b"IIRO\x08\0\0\0", "camera raw: ORF; send a rendered image"),
        (b"FUJIFILMCCD-RAW 0201", "camera raw: RAF; send a rendered image"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "a video; send one of its frames"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG; render it"),
        (b"\n<!DOCTYPE html><html></html>", "an HTML page; send the image that it shows"),
        (b"data:image/png;base64,iVBO", "a data URL; send the bytes"),
        (b"8BPS\0\1", "Photoshop document; convert it"),
        (b"PK\x03\x04", "an archive; send the images in it"),
        (bytes(128) + b"DICM", "DICOM; send its pixels as PNG"),
    ],
)  # fmt: skip
def test_other_kinds_are_named(data: bytes, words: str) -> None:
    assert refusal(data).startswith(f"not a supported image ({words}")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tga", "TGA; convert"), ("psd", "Photoshop document; convert"),
        ("pcx", "PCX; convert"), ("xbm", "XBM; convert"),
        ("xpm", "XPM; convert"), ("sgi", "SGI image; convert"), ("sun", "Sun raster; convert"),
        ("fits", "FITS; convert"),
        ("hdr", "Radiance HDR; convert"), ("dpx", "DPX or Cineon; convert"), ("cin", "DPX or Cineon; convert"),
        ("mng", "MNG or JNG; convert"), ("pam", "PNM; convert"), ("pfm", "PNM; convert"), ("pgm", "PNM; convert"),
        ("viff", "VIFF; convert"), ("miff", "MIFF; convert"), ("vips", "a file of libvips; convert"),
        ("dcx", "PCX; convert"), ("mat", "an array file; send"), ("ico", "icon or cursor; convert"),
    ],
)  # fmt: skip
def test_files_that_imagemagick_writes_are_named(kind: str, words: str) -> None:
    assert refusal(written(PHOTO, kind)).startswith(f"not a supported image ({words}")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (by_pillow("QOI"), "QOI; convert it"),
        (b"BLP2\1\0\0\0", "a texture; convert it"),
        (by_pillow("ICNS"), "icon or cursor; convert it"),
        (by_pillow("TGA", compression="tga_rle"), "TGA; convert it"),
        (gzip.compress(by_pillow("PNG")), "a compressed file; decompress it"),
        (bz2.compress(by_pillow("PNG")), "a compressed file; decompress it"),
        (lzma.compress(by_pillow("PNG")), "a compressed file; decompress it"),
        (base64.b64encode(by_pillow("PNG")), "base64 of an image; send the bytes"),
        (base64.b64encode(by_pillow("JPEG")), "base64 of an image; send the bytes"),
        (b'{"error": "not found"}', "JSON; send it with the content type"),
        (b"[1, 2]", "JSON; send it with the content type"),
        (b"<!-- a proxy --><html>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0"><html>', "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML; send an image"),
        (b'<?xml version="1.0"?><!-- Inkscape --><svg:svg xmlns:svg="http://www.w3.org/2000/svg">', "SVG; render"),
        (b'\xef\xbb\xbf<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x" [ <!ENTITY a "b"> ]><svg>', "SVG; render"),
        (b"https://example.org/a.jpg", "a URL; send the bytes"),
        (b"farbfeld\0\0\0\1\0\0\0\1" + bytes(8), "Farbfeld; convert it"),
        (b"\xd7\xcd\xc6\x9a\0\0", "Windows metafile; render it"),
        (b"\1\0\0\0\x6c\0\0\0" + bytes(32) + b" EMF", "Windows metafile; render it"),
        (b"\x76\x2f\x31\x01\2\0\0\0", "OpenEXR; convert it"),
        (b"\x93NUMPY\1\0v\0{'descr'", "a NumPy file; send its pixels"),
        (b"II\x1a\0\0\0HEAPCCDR", "camera raw: CRW; send"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "a video; send one"),
        (b"\0\0\0\x18ftypvvic\0\0\0\0mif1vvic", "HEIF with VVC inside; convert it"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS; fetch"),
    ],
)  # fmt: skip
def test_what_else_people_send_is_named(data: bytes, words: str) -> None:
    assert refusal(data).startswith(f"not a supported image ({words}")


@pytest.mark.parametrize("filler", [b"<!---->", b"<!-->", b"<!", b" ", b"<?xml", b"<", b"<!-- -", b"{ ", b"\0"])
@pytest.mark.parametrize("head", [b"", b"<", b"<?xml "])
def test_no_beginning_takes_long_to_be_named(head: bytes, filler: bytes) -> None:
    start = process_time()
    refusal(head + filler * 100_000)

    assert process_time() - start < 0.2


def lossless(width: int, height: int, components: int) -> bytes:
    """A lossless JPEG of grey: each difference takes a bit, which is zero."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body

    ids = range(1, components + 1)
    frame = struct.pack(">BHHB", 8, height, width, components) + b"".join(bytes((each, 0x11, 0)) for each in ids)
    scan = bytes((components,)) + b"".join(bytes((each, 0)) for each in ids) + bytes((1, 0, 0))
    table = bytes((0, 1)) + bytes(15) + b"\0"
    data = bytes(-(-width * height * components // 8))
    return b"\xff\xd8" + segment(0xC3, frame) + segment(0xC4, table) + segment(0xDA, scan) + data + b"\xff\xd9"


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("side", [64, 427])
def test_a_lossless_jpeg_is_refused_before_libjpeg_writes_beyond_the_reduced_image(components: int, side: int) -> None:
    """Read at 1/2 to 1/8 of its sides it ended the process."""
    data = lossless(640, 427, components)

    with Image.open(io.BytesIO(data)) as image:  # a sound one
        image.load()
    for each in (data, data.replace(b"\xff\xc3", b"\xff\xff\xff\xc3"), data[:2] + b"\xff\xfe\0\4\xff\xc0" + data[2:]):
        with pytest.raises(InvalidImage, match=r"^not a supported image \(lossless JPEG\)"):
            decode(each, Geometry(side, side, 1.0, "bicubic"), max_pixels=10**6)


def test_a_lossless_jpeg_in_a_tiff_is_refused_too() -> None:
    data, grey = saved(PHOTO.convert("L"), "TIFF", compression="jpeg"), lossless(*PHOTO.size, 1)
    with Image.open(io.BytesIO(data)) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        (start,), (count,) = image.tag_v2[273], image.tag_v2[279]
    entry = data.rindex(struct.pack("<HHII", 273, 4, 1, start)) + 8
    lengths = data.rindex(struct.pack("<HHII", 279, 4, 1, count)) + 8
    other = bytearray(data + grey)
    other[entry : entry + 4], other[lengths : lengths + 4] = struct.pack("<I", len(data)), struct.pack("<I", len(grey))

    assert refusal(bytes(other)).startswith("not a supported image (lossless JPEG)")


@pytest.mark.parametrize("bits", [12, 16])
def test_a_jpeg_of_more_than_8_bits_is_named(bits: int) -> None:
    data = saved(PHOTO, "JPEG")
    at = data.index(b"\xff\xc0") + 4

    message = refusal(data[:at] + bytes([bits]) + data[at + 1 :])

    assert message.startswith(f"not a supported image (JPEG: cannot handle {bits}-bit layers)")


def test_heic_without_its_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "FORMATS", tuple(name for name in kinds.FORMATS if name != "HEIF"))

    for brand in (b"heic", b"heix", b"hevc"):
        assert refusal(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic") == (
            "not a supported image (HEIC; convert it to JPEG, or install pvt-serve[heif] where the service runs)"
        )


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((32, 32, 3), np.float32), "3 floating-point samples of 32 bits"),
        (np.zeros((32, 32, 3), np.uint32), "3 unsigned samples of 32 bits"),
        (np.zeros((32, 32, 3), np.int16), "3 signed samples of 16 bits"),
        (np.zeros((32, 32, 3), np.float16), "3 floating-point samples of 16 bits"),
        (np.zeros((32, 32), np.complex64), "1 complex sample of 64 bits"),
    ],
)
def test_samples_that_are_not_read_are_described(pixels: Any, words: str, compression: Any) -> None:
    photometric: Any = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(buffer := io.BytesIO(), pixels, photometric=photometric, compression=compression)

    message = refusal(buffer.getvalue())

    assert message.startswith("not a supported image (TIFF")
    assert message.endswith(f"{words}); save it in grey or RGB, with 8 or 16 bits for each sample")


def test_what_helps_with_other_tiffs_is_said() -> None:
    tifffile.imwrite(big := io.BytesIO(), np.zeros((32, 32), np.uint8), bigtiff=True)
    tifffile.imwrite(usual := io.BytesIO(), np.zeros((32, 32), np.uint8), photometric="minisblack")
    compression = struct.pack("<HHIH", 259, 3, 1, 1)
    assert usual.getvalue().count(compression) == 1
    other = usual.getvalue().replace(compression, struct.pack("<HHIH", 259, 3, 1, 34887))

    assert refusal(big.getvalue()) == "not a supported image (BigTIFF); save it as a usual TIFF or as PNG"
    assert refusal(other) == "not a supported image (TIFF with compression 34887); save it with deflate or LZW"
    assert refusal(b"II*\0\x08\0\0\0" + bytes(6)) == "corrupt TIFF: its first directory has no size"


def test_bytes_of_no_known_kind_get_the_list_of_formats() -> None:
    assert refusal(b"hello, world") == f"not a supported image ({', '.join(kinds.FORMATS)})"
    assert refusal(b"") == "empty: the image has no bytes"


def test_a_png_is_turned_by_an_exif_block_behind_its_pixels() -> None:
    (exif := Image.Exif())[0x0112] = 6
    PHOTO.save(buffer := io.BytesIO(), "PNG", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    geometry = Geometry(64, 64, 0.9, "bicubic")

    with Image.open(io.BytesIO(late)) as image:
        image.load()
        assert image.getexif()[0x0112] == 6
    expected, found = (decode(each, geometry, max_pixels=10**6) for each in (data, late))

    assert (found.width, found.height) == (107, 160)
    assert np.array_equal(found.pixels, expected.pixels)
    for cut in (late[: len(late) - 20], late[:-12]):
        assert decode(cut, geometry, max_pixels=10**6).pixels.shape == (64, 64, 3)
