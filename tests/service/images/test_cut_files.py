"""Files of other programs, cut anywhere: the same pixels as the whole file, or refused; and not refused needlessly.

Whether a cut file still has all its pixels is for libvips to say, which is set to fail at a decoder's first warning.
"""

import io
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from service.errors import InvalidImage
from service.images.decoding import FORMATS, Geometry, decode
from tests.service.images.second_decoder import by_cjpeg, by_vips, saved, written

PHOTO = Image.fromarray(load_sample_images().images[0]).resize((161, 107), Image.Resampling.BICUBIC)
RGB: NDArray[np.uint8] = np.asarray(PHOTO)
TURNED = PHOTO.rotate(180)
CLEAR = PHOTO.copy()
CLEAR.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
SCANS = {  # scripts of cjpeg
    "by component": "0;\n1;\n2;\n",
    "grey first": "0;\n1,2;\n",
    "by frequency": "0,1,2: 0-0, 0, 0;\n0: 1-63, 0, 0;\n1: 1-63, 0, 0;\n2: 1-63, 0, 0;\n",
}
GREYS = ("-colorspace", "Gray", "-define", "png:color-type=0")
Writer = Callable[[], bytes]


def by_opencv(kind: str, *options: int) -> bytes:
    done, data = cv2.imencode(kind, RGB[..., ::-1], options)
    assert done
    return bytes(data.tobytes())


def by_tifffile(pixels: NDArray[Any], **options: Any) -> bytes:
    tifffile.imwrite(buffer := io.BytesIO(), pixels, **options)
    return buffer.getvalue()


def jpegs() -> dict[str, Writer]:
    """cjpeg's, of every subsampling; libjpeg reports no warning of those that simplejpeg has no name for."""
    found: dict[str, Writer] = {}
    ways: list[tuple[str, ...]] = [(), ("-progressive", "-restart", "3B"), ("-optimize", "-restart", "1B")]
    for at, factors in enumerate(("1x1", "2x1", "1x2", "2x2", "4x1", "1x4", "4x2", "2x4", "3x1")):
        for options in ways if factors in {"2x2", "1x4"} else ways[at % 3 : at % 3 + 1]:
            found[" ".join(("jpeg", factors, *options))] = partial(by_cjpeg, PHOTO, "-sample", factors, *options)
    for name, script in SCANS.items():
        found[f"jpeg {name}"] = partial(by_cjpeg, PHOTO, "-sample", "2x2", scans=script)
        found[f"jpeg {name}, 3x1"] = partial(by_cjpeg, PHOTO, "-sample", "3x1", "-restart", "5B", scans=script)
    for line in ("-grayscale", "-rgb", "-quality 100 -sample 2x4", "-quality 5"):
        found[f"jpeg {line}"] = partial(by_cjpeg, PHOTO, *line.split())
    for factors in ("1x1", "2x2"):
        cmyk = ("-colorspace", "CMYK", "-sampling-factor", factors)
        found[f"jpeg CMYK {factors}"] = partial(written, PHOTO, "jpeg", *cmyk)
    found["jpeg opencv"] = partial(by_opencv, ".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2)
    found["mpo"] = partial(saved, PHOTO, "MPO", save_all=True, append_images=[TURNED])
    return found


def pngs() -> dict[str, Writer]:
    kinds: dict[str, tuple[str, ...]] = {
        "rgb": ("-define", "png:color-type=2"),
        "rgb 16": ("-depth", "16", "-define", "png:color-type=2"),
        "rgba 16": ("-depth", "16", "-define", "png:color-type=6", "-alpha", "set"),
        "la": ("-colorspace", "Gray", "-depth", "8", "-define", "png:color-type=4", "-alpha", "set"),
        **{f"grey {bits}": (*GREYS, "-depth", bits) for bits in ("1", "2", "4", "8", "16")},
        **{f"palette {count}": ("-colors", count, "-define", "png:format=png8") for count in ("2", "16", "200")},
    }
    found: dict[str, Writer] = {}
    for at, (name, options) in enumerate(kinds.items()):
        for interlace in ("None", "PNG")[at % 2 : at % 2 + 1]:
            found[f"png {name} {interlace}"] = partial(written, PHOTO, "png", *options, "-interlace", interlace)
    several = partial(saved, PHOTO, "PNG", save_all=True, append_images=[TURNED])
    return {**found, "png libvips": partial(by_vips, PHOTO, ".png[interlace]"), "png animated": several}


def tiffs() -> dict[str, Writer]:
    found: dict[str, Writer] = {}
    layouts: dict[str, dict[str, Any]] = {"strip": {}, "strips": {"rowsperstrip": 10}, "tiles": {"tile": (32, 32)}}
    planes = np.ascontiguousarray(RGB.transpose(2, 0, 1))
    for method in (None, "zlib"):
        for name, layout in layouts.items():
            how = {"photometric": "rgb", "compression": method, **layout}
            found[f"tiff {method} {name}"] = partial(by_tifffile, RGB, **how)
            found[f"tiff planes {method} {name}"] = partial(by_tifffile, planes, planarconfig="separate", **how)
    for method in ("tiff_lzw", "packbits", "zstd", "lzma", "jpeg"):
        found[f"tiff {method}"] = partial(saved, PHOTO, "TIFF", compression=method)
    for method in ("LZW", "JPEG"):
        kinds = ("-colorspace", "CMYK"), ("-colorspace", "YCbCr"), ("-colors", "200", "-type", "Palette")
        for options in kinds:
            name = " ".join(("tiff", *options, method))
            found[name] = partial(written, PHOTO, "tiff", *options, "-compress", method)
    for method in ("group3", "group4", "tiff_ccitt"):
        found[f"tiff {method}"] = partial(saved, PHOTO.convert("1"), "TIFF", compression=method)
    for line in ("compression=jpeg,tile", "compression=deflate,tile,pyramid", "compression=lzw,predictor=horizontal"):
        found[f"tiff libvips {line}"] = partial(by_vips, PHOTO, f".tif[{line}]")
    return found


def others() -> dict[str, Writer]:
    found: dict[str, Writer] = {}
    for name, image in (("", PHOTO), (" alpha", CLEAR)):
        for lossless in (False, True):
            how = f"{name}{' lossless' if lossless else ''}"
            found[f"webp{how}"] = partial(saved, image, "WebP", lossless=lossless)
            several = {"save_all": True, "append_images": [image.rotate(180)]}
            found[f"webp animated{how}"] = partial(saved, image, "WebP", lossless=lossless, **several)
        found[f"webp libvips{name}"] = partial(by_vips, image, ".webp")
        for kind in sorted({"AVIF", "HEIF"}.intersection(FORMATS)):
            found[f"{kind}{name}"] = partial(saved, image, kind)
    for colours in ("2", "64", "256"):
        for interlace in ("None", "Line"):
            gif = ("-colors", colours, "-interlace", interlace)
            found[f"gif {colours} {interlace}"] = partial(written, PHOTO, "gif", *gif)
    first, second = PHOTO.quantize(64), TURNED.quantize(64)
    found["gif animated"] = partial(saved, first, "GIF", save_all=True, append_images=[second])
    for bmp in ((), ("-alpha", "set"), ("-define", "bmp:subtype=RGB565"), ("-define", "bmp:subtype=RGB555")):
        found[" ".join(("bmp", *bmp))] = partial(written, PHOTO, "bmp", *bmp)
    for kind in ("bmp", "bmp2", "bmp3"):
        for colours in ("2", "16", "200"):
            found[f"{kind} {colours}"] = partial(written, PHOTO, kind, "-colors", colours, "-type", "Palette")
    runs = ("-colors", "200", "-type", "Palette", "-compress", "RLE")
    return {**found, "bmp runs": partial(written, PHOTO, "bmp", *runs), "bmp top first": bmp_from_its_top}


def bmp_from_its_top() -> bytes:
    data = saved(PHOTO, "BMP")
    return data[:22] + (-PHOTO.height).to_bytes(4, "little", signed=True) + data[26:]


FILES = {**jpegs(), **pngs(), **tiffs(), **others()}


def ours(data: bytes) -> NDArray[np.uint8] | None:
    try:
        return decode(data, Geometry(107, 161, 1.0, "bilinear"), max_pixels=10**6).pixels
    except InvalidImage:
        return None


def read_by_vips(data: bytes) -> bytes | None:
    """The numbers that libvips reads; None where it warns or fails."""
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder) / "source").write_bytes(data)
        target = Path(folder) / "numbers.raw"
        done = subprocess.run(
            ["vips", "rawsave", f"{source}[fail_on=warning]", str(target)], capture_output=True, check=False
        )
        return None if done.returncode or done.stderr else target.read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_the_whole_image_or_refused(name: str) -> None:
    data = FILES[name]()
    whole = ours(data)
    assert whole is not None
    refused = []
    for end in sorted({*range(len(data) - 17, len(data), 2), *range(0, len(data), len(data) // 9)}):
        cut = ours(data[:end])
        if cut is None:
            refused.append(end)
        else:
            assert np.array_equal(cut, whole), (end - len(data), np.abs(cut.astype(int) - whole).max())

    assert len(refused) > 3
    cut_too = read_by_vips(data[: refused[-1]])
    assert cut_too is None or cut_too != read_by_vips(data)
