"""What we decode is what libvips or ImageMagick decode of the same file, within a stated number of levels of 255."""

import io
import struct
import zlib
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from service.errors import InvalidImage
from service.images.decoding import FORMATS, Geometry, decode
from tests.service.images.second_decoder import by_vips, magick, saved, vips, written

Order = Literal["<", ">"]
PHOTO = Image.fromarray(load_sample_images().images[0]).resize((101, 67), Image.Resampling.BICUBIC)
LEVELS: NDArray[np.float64] = (np.asarray(PHOTO.convert("L"), np.float64) - 1) / 253  # of grey, from 0 to 1
COLOURS: NDArray[np.float64] = np.asarray(PHOTO, np.float64) / 255
ALPHA = np.clip(np.linspace(-0.2, 1.3, PHOTO.width), 0, 1) * np.ones((PHOTO.height, 1))
CLEAR = Image.fromarray(np.dstack([np.asarray(PHOTO), (ALPHA * 255).astype(np.uint8)]))


def ours(data: bytes) -> NDArray[np.int16]:
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    return decode(data, Geometry(height, width, 1.0, "bilinear"), max_pixels=10**6).pixels.astype(np.int16)


def apart(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())


def spread(values: NDArray[np.float64], kind: str) -> NDArray[Any]:
    """`values` from 0 to 1 as numbers of a type, over all of its range."""
    if np.dtype(kind).kind == "f":
        return values.astype(kind)
    info = np.iinfo(kind)
    return np.rint(values * (float(info.max) - info.min) + info.min).clip(info.min, info.max).astype(kind)


def tiff(pixels: NDArray[Any], order: Order, packed: bool, **options: Any) -> bytes:
    """As tifffile writes it: plain strips, or deflated tiles with a predictor."""
    how: dict[str, Any] = {"compression": "zlib", "predictor": pixels.dtype.kind != "f"} if packed else {}
    if packed and options.get("planarconfig") != "separate":  # of which libvips reads no tiles
        how["tile"] = (32, 32)
    tifffile.imwrite(
        buffer := io.BytesIO(), pixels.astype(pixels.dtype.newbyteorder(order)), byteorder=order, **how, **options
    )
    return buffer.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8"])
def test_grey_of_every_type_is_what_the_second_decoder_reads(kind: str, order: Order, packed: bool) -> None:
    values = spread((LEVELS - LEVELS.min()) / (LEVELS.max() - LEVELS.min()), kind)
    data = tiff(values, order, packed, photometric="minisblack")

    read = vips(data)[..., :1] if kind != "f8" else magick(data, "tiff")[..., :1]  # libvips knows no float64

    assert apart(ours(data), (read - read.min()) / (read.max() - read.min()) * 255) <= 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2", "u4"])
def test_grey_whose_zero_is_white_is_no_negative(kind: str, order: Order, packed: bool) -> None:
    values = spread((LEVELS - LEVELS.min()) / (LEVELS.max() - LEVELS.min()), kind)
    data = tiff(values, order, packed, photometric="miniswhite")

    read = vips(data)[..., :1]

    assert apart(ours(data), read / np.iinfo(kind).max * 255) <= 1
    assert apart(ours(data), 255 - values[..., np.newaxis] / np.iinfo(kind).max * 255) <= 1


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "f4", "f8"])
def test_signed_and_float_grey_whose_zero_is_white_is_turned_as_the_standard_says(kind: str) -> None:
    """libvips and ImageMagick turn unsigned numbers only, so the truth is the file's other direction."""
    values = spread((LEVELS - LEVELS.min()) / (LEVELS.max() - LEVELS.min()), kind)
    white, black = (tiff(values, "<", False, photometric=f"minis{name}") for name in ("white", "black"))

    assert apart(ours(white), 255 - ours(black)) <= 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("extra", [None, "assocalpha", "unassalpha"])
def test_colours_of_a_tiff_lie_where_they_belong(
    extra: str | None, planes: str, kind: str, order: Order, packed: bool
) -> None:
    colours = COLOURS * ALPHA[..., np.newaxis] if extra == "assocalpha" else COLOURS
    pixels = spread(np.dstack([colours, ALPHA]) if extra else colours, kind)
    pixels = pixels if planes == "contig" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    options = {"extrasamples": [extra]} if extra else {}
    data = tiff(pixels, order, packed, photometric="rgb", planarconfig=planes, **options)

    read = vips(data) / np.iinfo(kind).max
    alpha = read[..., 3:] if extra else 1  # libvips divides by it what was multiplied with it

    assert apart(ours(data), (read[..., :3] * alpha + 1 - alpha) * 255) <= 3


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_cmyk_is_mixed_as_imagemagick_mixes_it(planes: str, kind: str) -> None:
    pixels = spread(np.dstack([1 - COLOURS, np.full(LEVELS.shape, 0.2)]), kind)
    pixels = pixels if planes == "contig" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    data = tiff(pixels, "<", False, photometric="separated", planarconfig=planes)

    assert apart(ours(data), magick(data, "tiff")) <= 2


@pytest.mark.parametrize("tiles", [{}, {"tile": (32, 32)}, {"compression": "zlib"}])
def test_lab_of_8_bits_is_what_imagemagick_reads_with_signed_colours(tiles: dict[str, Any]) -> None:
    lab = cv2.cvtColor(COLOURS.astype(np.float32), cv2.COLOR_RGB2LAB)
    signed = np.rint(lab * (2.55, 1, 1)).astype(np.int16).astype(np.uint8)  # as two's complement
    data = tiff(signed, "<", False, photometric="cielab", **tiles)

    assert apart(ours(data), magick(data, "tiff")) <= 8  # of another white
    assert np.abs(ours(data) - COLOURS * 255).mean() < 1.5


@pytest.mark.parametrize(
    ("kind", "photometric", "name"),
    [
        ("u2", "cielab", "Lab: 3 unsigned samples of 16 bits"),
        ("i2", "cielab", "Lab: 3 signed samples of 16 bits"),
        ("f4", "cielab", "Lab: 3 floating-point samples of 32 bits"),
        ("u1", "icclab", "ICC Lab: 3 unsigned samples of 8 bits"),
        ("u2", "icclab", "ICC Lab: 3 unsigned samples of 16 bits"),
        ("u1", "itulab", "ITU Lab: 3 unsigned samples of 8 bits"),
    ],
)
def test_other_lab_is_refused_by_name(kind: str, photometric: str, name: str) -> None:
    data = tiff(np.zeros((4, 4, 3), kind), "<", False, photometric=photometric)

    with pytest.raises(InvalidImage, match=rf"^not a supported image \(TIFF of {name}"):
        decode(data, Geometry(4, 4, 1.0, "bilinear"), max_pixels=100)


@pytest.mark.parametrize("kind", ["f2", "u8", "i8"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_that_can_not_be_read_rightly_is_refused_with_what_it_is(kind: str, photometric: str) -> None:
    data = tiff(np.zeros((4, 4), kind), "<", False, photometric=photometric)
    form = {"f": "floating-point", "u": "unsigned", "i": "signed"}[kind[0]]

    with pytest.raises(
        InvalidImage, match=f"not a supported image .TIFF of .*: 1 {form} sample of {8 * int(kind[1])} "
    ):
        decode(data, Geometry(4, 4, 1.0, "bilinear"), max_pixels=100)


@pytest.mark.parametrize("kind", ["f4", "u4", "i2"])
def test_colours_of_other_types_are_refused_with_what_they_are(kind: str) -> None:
    data = tiff(np.zeros((4, 4, 3), kind), "<", False, photometric="rgb")

    with pytest.raises(InvalidImage, match=r"not a supported image \(TIFF of RGB: 3 "):
        decode(data, Geometry(4, 4, 1.0, "bilinear"), max_pixels=100)


def test_a_tiff_of_webps_is_read_where_libtiff_can_and_else_named() -> None:
    data = by_vips(PHOTO, ".tif[compression=webp,lossless]")

    try:
        read = ours(data)
    except InvalidImage as error:
        assert str(error) == "not a supported image (TIFF with webp inside); save it with deflate or LZW"  # noqa: PT017
    else:
        assert apart(read, vips(data)) <= 2


GREY_TIFFS = [
    (
        "-colorspace",
        "Gray",
        "-depth",
        bits,
        "-define",
        f"quantum:polarity={polarity}",
        "-define",
        f"tiff:fill-order={fill}",
        "-compress",
        method,
    )
    for bits in ("1", "2", "4", "8", "16")
    for polarity in ("min-is-white", "min-is-black")
    for fill, method in (("msb", "RLE"), ("lsb", "None"), ("lsb", "Zip"))
]
OTHER_TIFFS = [
    ("-monochrome", "-compress", "Group4"),
    ("-monochrome", "-compress", "Fax", "-define", "tiff:fill-order=lsb"),
    *(
        ("-colors", count, "-type", "Palette", "-compress", how)
        for count in ("2", "16", "200")
        for how in ("None", "LZW")
    ),
    *(
        ("-sampling-factor", s, "-colorspace", "YCbCr", "-compress", how)
        for s in ("1x1", "2x2")
        for how in ("None", "Zip")
    ),
    *(("-sampling-factor", s, "-compress", "JPEG") for s in ("1x1", "2x2")),
]
PNGS = [
    *(
        ("-colorspace", "Gray", "-depth", bits, "-interlace", how)
        for bits in ("1", "2", "4", "8", "16")
        for how in ("None", "PNG")
    ),
    *(("-depth", bits, "-interlace", how) for bits in ("8", "16") for how in ("None", "PNG")),
    *(
        ("-colors", count, "-define", "png:format=png8", "-interlace", how)
        for count in ("2", "16", "200")
        for how in ("None", "PNG")
    ),
]
BMPS = [
    *(
        ("-colors", count, "-type", "Palette", *how)
        for count in ("2", "4", "16", "200")
        for how in ((), ("-compress", "RLE"))
    ),
    ("-define", "bmp:subtype=RGB565"),
    ("-define", "bmp:subtype=RGB555"),
]
JPEGS = [
    ("-sampling-factor", "4:2:0"),
    ("-sampling-factor", "4:4:4", "-interlace", "Line"),
    ("-sampling-factor", "1x4"),
    ("-colorspace", "Gray"),
    ("-colorspace", "CMYK"),
]


@pytest.mark.parametrize("options", GREY_TIFFS, ids=" ".join)
def test_grey_of_few_bits_is_what_libvips_reads(options: tuple[str, ...]) -> None:
    """And not ImageMagick, which takes its own where white is zero, of 2 and 4 bits, for the negative."""
    data = written(PHOTO, "tiff", *options)

    read = vips(data)

    assert apart(ours(data), read * (255 / 65535 if "16" in options else 1)) <= 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("tiff", options) for options in OTHER_TIFFS),
        *(("png", options) for options in PNGS),
        *(("bmp", options) for options in BMPS),
        *(("bmp3", ("-colors", count)) for count in ("2", "16", "200")),
        *(("gif", ("-colors", "64", "-interlace", how)) for how in ("None", "Line")),
        *(("jpeg", options) for options in JPEGS),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_files_of_imagemagick_look_as_they_do_to_imagemagick(kind: str, options: tuple[str, ...]) -> None:
    data = written(PHOTO, kind, *options)

    assert apart(ours(data), magick(data, kind.rstrip("3"))) <= 2


@pytest.mark.parametrize("options", [("-depth", "8"), ("-depth", "16"), ("-colorspace", "Gray")])
def test_a_pngs_alpha_lies_on_white_as_in_imagemagick(options: tuple[str, ...]) -> None:
    data = written(CLEAR, "png", *options)

    assert apart(ours(data), magick(data, "png")) <= 2


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"lossless": True, "exact": True}])
@pytest.mark.parametrize("image", [PHOTO, CLEAR], ids=["opaque", "clear"])
def test_webp_is_what_libvips_reads(image: Image.Image, options: dict[str, Any]) -> None:
    data = saved(image, "WebP", **options)

    read = vips(data)
    alpha = read[..., 3:] / 255 if read.shape[2] > 3 else 1

    assert apart(ours(data), read[..., :3] * alpha + 255 * (1 - alpha)) <= 2


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF")
def test_avif_is_what_libvips_reads_but_for_the_interpolation_of_colours() -> None:
    data = saved(PHOTO, "AVIF", subsampling="4:4:4")

    assert apart(ours(data), vips(data)) <= 3


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": "4:2:2"}, {"keep_rgb": True}]
)
def test_jpegs_are_what_libvips_reads(options: dict[str, Any]) -> None:
    data = saved(PHOTO, "JPEG", **options)

    assert apart(ours(data), vips(data)) <= 2


def test_a_frame_smaller_than_its_canvas_lies_on_white_and_is_itself_what_libvips_reads() -> None:
    """libvips paints the canvas black, browsers leave it to the page."""
    data = written(PHOTO, "gif", "-colors", "60", "-repage", "200x150+30+20")

    seen, read = ours(data), vips(data)[..., :3]

    inside = (slice(20, 20 + PHOTO.height), slice(30, 30 + PHOTO.width))
    assert apart(seen[inside], read[inside]) == 0
    seen[inside] = 255
    assert (seen == 255).all()


@pytest.mark.parametrize("options", [("-repage", "200x150+30+20"), ("-set", "dispose", "background")])
def test_a_transparent_gif_lies_on_white(options: tuple[str, ...]) -> None:
    data = written(CLEAR, "gif", *options)

    read = vips(data)
    alpha = read[..., 3:] / 255

    assert apart(ours(data), read[..., :3] * alpha + 255 * (1 - alpha)) == 0


def png(pixels: NDArray[Any], bits: int, key: tuple[int, ...]) -> bytes:
    """Grey or coloured, with one value or colour transparent."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, bands = pixels.shape
    binary = (pixels.reshape(height, -1, 1) >> np.arange(bits)[::-1] & 1).reshape(height, -1)
    packed = b"".join(b"\0" + row.tobytes() for row in np.packbits(binary.astype(np.uint8), axis=1))
    header = struct.pack(">IIBBBBB", width, height, bits, 0 if bands == 1 else 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", struct.pack(f">{bands}H", *key)), (b"IDAT", zlib.compress(packed))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("bands", [1, 3])
def test_a_pngs_transparent_colour_is_compared_with_what_the_file_holds(bands: int, bits: int) -> None:
    """Of 16 bits also where others differ from it in the low ones only."""
    if bands == 3 and bits < 8:
        bits = 8
    key = tuple(0xB6D1 & 2**bits - 1 for _ in range(bands))
    pixels = np.random.default_rng(0).integers(0, 2**bits, (30, 40, bands))
    pixels[:10], pixels[10:20] = key, np.array(key) ^ 1
    data = png(pixels, bits, key)

    read = vips(data) / (65535 if bits == 16 else 255)

    seen = (read[..., :-1] * read[..., -1:] + 1 - read[..., -1:]) * 255
    assert apart(ours(data), seen) <= 1
    assert (ours(data)[:10] == 255).all()
    assert (ours(data)[10:20] < 255).any() or bits == 1


def animation(*frames: tuple[int, int, Image.Image], width: int, height: int) -> bytes:
    """A WebP of frames at (x, y), which says that it has no alpha."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    def three(*values: int) -> bytes:
        return b"".join(struct.pack("<I", value)[:3] for value in values)

    body = chunk(b"VP8X", b"\2\0\0\0" + three(width - 1, height - 1)) + chunk(b"ANIM", b"\x10\x20\x30\xff\0\0")
    for x, y, frame in frames:
        place = three(x // 2, y // 2, frame.width - 1, frame.height - 1, 100) + b"\0"
        body += chunk(b"ANMF", place + saved(frame, "WebP")[12:])
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("later", [(), ((0, 0, PHOTO),)])
def test_a_webps_frame_smaller_than_its_canvas_lies_on_white(later: tuple[tuple[int, int, Image.Image], ...]) -> None:
    data = animation((10, 20, PHOTO.resize((40, 30))), *later, width=PHOTO.width, height=PHOTO.height)

    read = vips(data)
    alpha = read[..., 3:] / 255

    assert (ours(data)[:20] == 255).all()
    assert apart(ours(data), read[..., :3] * alpha + 255 * (1 - alpha)) <= 2
