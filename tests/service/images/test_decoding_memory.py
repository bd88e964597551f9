"""An image costs its own decoded size and little more, whatever its mode; what would cost more is refused."""

import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin
from sklearn.datasets import load_sample_images

from service.errors import ImageTooLarge
from service.images.decoding import FORMATS, Geometry, cost, decode
from tests.service.images.peaks import measuring

SIZE = (4000, 3000)
PIXELS = SIZE[0] * SIZE[1]
GEOMETRY = Geometry(224, 224, 0.9, "bicubic")
UNCOUNTED = 8_000_000  # bytes: the file, Python, what the first large allocation makes the allocator keep
OVERHEAD = 24_000_000  # bytes: one strip's conversion, the intermediate of the resize, the allocator


@pytest.fixture(scope="module")
def grown() -> Iterator[Callable[[bytes], int]]:
    """By how many bytes decoding an image raises the peak of a process that does nothing else."""
    with measuring() as measure:
        yield measure


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def of_mode(mode: str, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.new("L", size, 90).convert(mode) if mode != "I;16" else Image.new(mode, size, 9000)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "mode", "options", "bytes_per_pixel"),
    [
        ("TIFF", "F", {"compression": "tiff_adobe_deflate"}, 4),
        ("TIFF", "I", {"compression": "tiff_adobe_deflate"}, 4),
        ("TIFF", "F", {"compression": "tiff_lzw", "tiffinfo": {0x0112: 6}}, 8),  # Pillow turns it, at its full size
        ("PNG", "I;16", {}, 2),
        ("PNG", "RGBA", {}, 4),
        ("PNG", "LA", {}, 4),
        ("PNG", "RGB", {"transparency": (1, 2, 3)}, 4),
        ("PNG", "P", {"transparency": bytes(range(256))}, 1),
        ("PNG", "1", {}, 1),
        ("GIF", "P", {"transparency": 1}, 1),
        ("JPEG", "RGB", {}, 4),
        ("JPEG", "CMYK", {}, 4),
        ("TIFF", "LAB", {"compression": "tiff_lzw"}, 4),
        ("WebP", "RGBA", {"lossless": True, "method": 0}, 12),
        ("WebP", "RGB", {"method": 0}, 12),
        ("AVIF", "RGB", {"speed": 10}, 12),
        ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}, 16),
    ],
)
def test_the_peak_is_the_decoded_image_and_little_more(
    kind: str, mode: str, options: dict[str, Any], bytes_per_pixel: int, grown: Callable[[bytes], int]
) -> None:
    if kind not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    data = encode(of_mode(mode) if mode != "LAB" else Image.new(mode, SIZE), kind, **options)

    taken = grown(data)

    assert taken < bytes_per_pixel * PIXELS + OVERHEAD
    assert taken < cost(data, GEOMETRY, max_pixels=50_000_000, scaled_jpeg=False).bytes + UNCOUNTED


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("mode", "bytes_per_pixel"), [("RGB", 7), ("CMYK", 9)])
def test_a_large_jpeg_of_many_scans_is_read_at_half_its_sides_at_most(
    mode: str, bytes_per_pixel: int, grown: Callable[[bytes], int]
) -> None:
    """libjpeg holds two bytes for each value of it, and the image itself is then a quarter."""
    size = (4600, 4000)
    data = encode(of_mode(mode, size), "JPEG", progressive=True, subsampling=0)

    taken = grown(data)

    assert taken < bytes_per_pixel * size[0] * size[1] + OVERHEAD
    assert taken < cost(data, GEOMETRY, max_pixels=50_000_000, scaled_jpeg=False).bytes + UNCOUNTED


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).resize((width, height), Image.Resampling.BICUBIC)


def apart(a: bytes, b: bytes) -> NDArray[np.int16]:
    first, second = (decode(data, GEOMETRY, max_pixels=2 * 10**7, scaled_jpeg=False) for data in (a, b))
    assert (first.width, first.height) == (second.width, second.height)
    difference: NDArray[np.int16] = np.abs(first.pixels.astype(np.int16) - second.pixels)
    return difference


def test_half_of_a_large_jpeg_is_within_two_levels_of_all_of_it() -> None:
    image = photo(5001, 3401)  # odd, so that the half has a fraction of a pixel

    difference = apart(*(encode(image, "JPEG", quality=90, progressive=p) for p in (True, False)))

    assert difference.max() <= 2
    assert difference.mean() < 0.3


@pytest.mark.parametrize("size", [(1500, 1000), (1000, 1500), (6000, 300), (300, 6000)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_strips_join_without_a_seam(size: tuple[int, int], interpolation: Any) -> None:
    """Composited on white by strips, it is the image composited as a whole, which a BMP takes past the strips.

    Rounding of the strips' boxes is worth one level; of a tall image Pillow may filter columns before rows, and the
    clipping between the passes then differs, as in the published two steps.
    """
    image = photo(*size)
    image.putalpha(Image.linear_gradient("L").resize(size))
    (white := Image.new("RGB", size, "white")).paste(image, mask=image)
    geometry = Geometry(224, 224, 0.9, interpolation)

    seen, expected = (
        decode(data, geometry, max_pixels=10**7).pixels.astype(np.int16)
        for data in (encode(image, "PNG", compress_level=1), encode(white, "BMP"))
    )

    assert np.abs(seen - expected).max() <= (1 if size[0] > size[1] or interpolation == "bilinear" else 12)
    assert np.abs(seen - expected).mean() < 0.05


@pytest.mark.parametrize("orientation", range(1, 9))
def test_strips_are_turned_as_a_whole_image_is(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photo(1200, 800)

    difference = apart(*(encode(i, "PNG", exif=exif, compress_level=1) for i in (image, image.convert("RGBA"))))

    assert difference.max() <= 8
    assert difference.mean() < 0.05


def test_the_range_of_a_large_image_is_that_of_all_its_strips() -> None:
    values = np.zeros((1200, 1200), np.float32)
    values[0, 0], values[-1, -1], values[600, :10] = -100_000, 100_000, np.nan

    pixels = decode(encode(Image.fromarray(values), "TIFF"), GEOMETRY, max_pixels=10**7).pixels

    assert set(np.unique(pixels)) <= {127, 128, 129}


def tiled(side: int, tile: int, bits: int = 8) -> bytes:
    body, count = zlib.compress(bytes(1000)), 10
    tags = [(256, side), (257, side), (258, bits), (259, 8), (262, 1), (277, 1)]
    tags += [(322, tile), (323, tile), (324, 14 + 12 * count), (325, len(body))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, count) + directory + bytes(4) + body


@pytest.mark.parametrize(("tile", "bits"), [(40_000, 8), (40_000, 1), (2**31, 8), (2**32 - 16, 8)])
def test_a_tile_larger_than_the_limit_is_refused_whatever_the_image(tile: int, bits: int) -> None:
    with pytest.raises(ImageTooLarge, match=r"megapixels, the limit is 50 \(PVT_MAX_IMAGE_MEGAPIXELS\)"):
        decode(tiled(1, tile, bits), GEOMETRY, max_pixels=50_000_000)


def test_a_strip_as_large_as_the_image_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 10**9)
    image = Image.new("RGBA", (1000, 1000))

    assert decode(encode(image, "TIFF", compression="tiff_lzw"), GEOMETRY, max_pixels=10**6).pixels.all()
    with pytest.raises(ImageTooLarge, match="takes 12 megabytes, the limit is 9 "):  # and a turned copy
        decode(encode(image, "TIFF", compression="tiff_lzw", tiffinfo={0x0112: 6}), GEOMETRY, max_pixels=10**6)


def test_a_tiff_that_only_its_xmp_turns_is_turned() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image = photo(1200, 800)

    plain, turned = (encode(image, "TIFF", tiffinfo=info) for info in ({274: 6}, {700: xmp}))

    assert decode(turned, GEOMETRY, max_pixels=10**6).width == 800
    assert not apart(plain, turned).any()


@pytest.mark.parametrize(("kind", "mode", "share"), [("WebP", "RGB", 12), ("WebP", "RGBA", 12), ("AVIF", "RGBA", 16)])
def test_formats_whose_decoder_holds_copies_have_less_pixels(kind: str, mode: str, share: int) -> None:
    if kind not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    image = Image.new(mode, (300, 300))
    image.putpixel((0, 0), tuple(range(10, 10 + len(mode))))  # else the encoder drops the transparency
    data, fits = encode(image, kind), -(-300 * 300 * share // 9)

    assert decode(data, GEOMETRY, max_pixels=fits).width == 300
    with pytest.raises(ImageTooLarge, match="PVT_MAX_IMAGE_MEGAPIXELS"):
        decode(data, GEOMETRY, max_pixels=fits - 1)
