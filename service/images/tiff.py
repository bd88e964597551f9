"""Which TIFFs are read, and the meaning of their samples.

Pillow's table of TIFFs lacks some kinds that it can read, and is wrong for some that it lists; both are corrected here.
All other kinds are refused with a description.
"""

import io
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImagePalette, TiffImagePlugin
from PIL.ImageFile import _Tile

from service.errors import InvalidImage
from service.images.jpeg import check_inner_jpeg
from service.images.limits import BoundedReader, check_memory, too_large
from service.images.resampling import Grey

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _YCBCR = 0, 1, 6
_BYTE = 8  # bits
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_SEPARATE = 2
_LOWEST_BIT_FIRST = 2
_JPEG = 7
_OPTIONAL = {"lzma", "zstd", "webp"}  # Pillow's names of compressions that libtiff may lack
_JPEG_TABLES = 347
_DEEP = {  # sample format and bits: Pillow's mode, and its raw mode for little-endian samples
    (_SIGNED, 8): ("L", "L"),
    (_UNSIGNED, 12): ("I;16", "I;12"),
    (_SIGNED, 16): ("I", "I;16S"),
    (_UNSIGNED, 32): ("I", "I;32S"),
    (_SIGNED, 32): ("I", "I;32S"),
    (_FLOAT, 32): ("F", "F;32F"),
    (_FLOAT, 64): ("F", "F;64F"),
}
# Pillow's raw modes with a byte order: none for little-endian samples, B for big-endian ones, N for the machine's own.
_ORDERED = re.compile(r"([IF];(?:16|32|64))B?([SF]?)")
# the type of the samples where the mode's is another
_TYPES: dict[tuple[int, int], np.dtype[Any]] = {(_SIGNED, 8): np.dtype(np.int8), (_UNSIGNED, 32): np.dtype(np.uint32)}

_PHOTOMETRICS = {
    0: "grey with white as zero",
    1: "grey",
    2: "RGB",
    3: "palette",
    5: "CMYK",
    6: "YCbCr",
    8: "Lab",
    9: "ICC Lab",
    10: "ITU Lab",
}
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "untyped", 5: "complex", 6: "complex"}
_AS_DEFLATE = "); save it with deflate or LZW"
_AS_USUAL = "); save it in grey or RGB, with 8 or 16 bits for each sample"


def _ordered(raw_mode: str, order: str) -> str:
    found = _ORDERED.fullmatch(raw_mode)
    return f"{found[1]}{order}{found[2]}" if found else raw_mode


def _complete_table() -> None:
    """Add deep grey to Pillow's table, in both byte orders and directions."""
    table = TiffImagePlugin.OPEN_INFO
    for (prefix, order), photometric in product(((b"II", ""), (b"MM", "B")), (_WHITE_IS_ZERO, _BLACK_IS_ZERO)):
        for (form, bits), (mode, raw_mode) in _DEEP.items():
            table[prefix, photometric, (form,), 1, (bits,), ()] = mode, _ordered(raw_mode, order)
        for fill, raw_mode in ((1, f"I;16{order}"), (_LOWEST_BIT_FIRST, "I;16R")):
            table[prefix, photometric, (_UNSIGNED,), fill, (16,), ()] = f"I;16{order}", raw_mode


_complete_table()


@cache
def _is_built_in(compression: str) -> bool:
    """Whether Pillow's libtiff knows it; it depends on what it was built with, and Pillow does not say."""
    with suppress(OSError):
        Image.new("RGB", (16, 16)).save(io.BytesIO(), "TIFF", compression=compression)
        return True
    return False


class _Layout:
    """The tags that describe the samples; where one is missing, TIFF's default."""

    def __init__(self, tags: Mapping[int, Any]) -> None:
        self.photometric: int = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0)
        self.form: int = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]
        self.bits: tuple[int, ...] = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        self.samples: int = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        self.separate: bool = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == _SEPARATE

    def __str__(self) -> str:
        kind = _PHOTOMETRICS.get(self.photometric, f"photometric {self.photometric}")
        bits = ", ".join(map(str, sorted(set(self.bits))))
        planes = ", in separate planes" if self.separate and self.samples > 1 else ""
        form = _FORMATS.get(self.form, f"format {self.form}")
        samples = "sample" if self.samples == 1 else "samples"
        return f"TIFF of {kind}: {self.samples} {form} {samples} of {bits} bits{planes}"


def refusal(raw: bytes) -> InvalidImage:
    """The error for a TIFF that Pillow does not read, which describes it.

    Raises:
        Exception: whatever Pillow raises on tags that it can't read.
    """
    tags = TiffImagePlugin.ImageFileDirectory_v2(raw[:8])
    (stream := BoundedReader(raw)).seek(tags.next)
    tags.load(stream)
    compression = tags.get(TiffImagePlugin.COMPRESSION, 1)
    if not {TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH}.issubset(tags):
        return InvalidImage("corrupt TIFF: its first directory has no size")
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        return InvalidImage(f"not a supported image (TIFF with compression {compression}{_AS_DEFLATE}")
    return InvalidImage(f"not a supported image ({_Layout(tags)}{_AS_USUAL}")


def prepare(image: Image.Image, raw: bytes, max_pixels: int) -> Grey | None:
    """Check an open TIFF before it is decoded; returns the meaning of its samples, if they are deep grey.

    Raises:
        InvalidImage: Pillow would decode it wrongly, or pixels of a JPEG inside are missing.
        ImageTooLarge: its tiles or strips take more memory or time than its pixels.
    """
    opened = vars(image)
    opened["is_animated"] = True  # keeps Pillow from reading all its EXIF, which may take seconds
    tags: Mapping[int, Any] = opened["tag_v2"]
    layout = _Layout(tags)
    if layout.separate and image.mode in {"LA", "La", "PA", "LAB"}:
        raise InvalidImage(f"not a supported image ({layout}{_AS_USUAL}")
    if opened["tile"][0].codec_name == "raw":
        _check_offsets(tags, layout)
    _choose_decoder(image, layout)
    compression = TiffImagePlugin.COMPRESSION_INFO.get(tags.get(TiffImagePlugin.COMPRESSION, 1), "")
    if compression in _OPTIONAL and not _is_built_in(compression):
        raise InvalidImage(f"not a supported image (TIFF with {compression} inside{_AS_DEFLATE}")
    if opened["tile"][0].codec_name == "libtiff":  # which decodes them whole; Pillow reads uncompressed ones by rows
        _check_blocks(image, tags, max_pixels)
    if tags.get(TiffImagePlugin.COMPRESSION) == _JPEG:
        _check_jpegs(tags, raw)
    if image.palette and max(colours := tags[TiffImagePlugin.COLORMAP]) < 256:  # noqa: PLR2004
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))  # of 8 bits, where the standard has 16
    kind = layout.form, layout.bits[0]
    if image.mode[0] not in "IF" and kind not in _TYPES:
        return None
    white = 2 ** layout.bits[0] - 1 if image.mode.startswith("I;16") else None
    inverted = layout.photometric == _WHITE_IS_ZERO
    return Grey(white, _TYPES.get(kind), inverted=inverted, rounded=kind == (_FLOAT, 64))


def _choose_decoder(image: Image.Image, layout: _Layout) -> None:
    """Make libtiff decode files that Pillow would decode wrongly, and Pillow interpret libtiff's samples correctly."""
    opened = vars(image)
    codec, _, _, (raw_mode, *_) = opened["tile"][0]
    separate = layout.separate and layout.samples > 1
    if codec == "libtiff":
        raw_mode = _ordered(raw_mode, "N")
    elif layout.photometric == _YCBCR:
        opened["_mode"], raw_mode = "RGB", "RGBX"  # libtiff converts it
    elif separate and (layout.bits[0] > _BYTE or image.mode == "RGBA"):
        raw_mode = image.mode if layout.bits[0] == _BYTE else f"{image.mode};16N"
    elif opened["tag_v2"].get(TiffImagePlugin.FILLORDER) == _LOWEST_BIT_FIRST:
        raw_mode = _ordered(raw_mode.removesuffix("R").removesuffix(";"), "N")  # libtiff has turned the bits by then
    else:
        return
    opened["use_load_libtiff"] = True
    opened["tile"] = [_Tile("libtiff", (0, 0, *opened["_tile_size"]), 0, (raw_mode, False, opened["tag_v2"].offset))]


def _sizes(tags: Mapping[int, Any], *, tiled: bool = True) -> tuple[int, int, int, int]:
    """Width and height of the image, and of a tile, or of a strip where there is none or not `tiled`."""
    width, height = tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
    rows = min(height, tags.get(TiffImagePlugin.ROWSPERSTRIP, height))
    if not tiled:
        return width, height, width, rows
    return width, height, tags.get(TiffImagePlugin.TILEWIDTH, width), tags.get(TiffImagePlugin.TILELENGTH, rows)


def _check_offsets(tags: Mapping[int, Any], layout: _Layout) -> None:
    """Refuse an uncompressed TIFF that lacks strips or tiles: Pillow makes them black, or takes the header for one."""
    strips = tags.get(TiffImagePlugin.STRIPOFFSETS)
    width, height, across, down = _sizes(tags, tiled=not strips)
    offsets = strips or tags.get(TiffImagePlugin.TILEOFFSETS, ())
    needed = -(-width // across) * -(-height // down) * (layout.samples if layout.separate else 1)
    if missing := needed - sum(offset > 0 for offset in offsets[:needed]):
        raise InvalidImage(f"truncated TIFF: {missing} of its {needed} strips or tiles are missing")


def _check_blocks(image: Image.Image, tags: Mapping[int, Any], max_pixels: int) -> None:
    """Refuse a TIFF whose tiles or strips take more memory or time than its pixels."""
    width, height, across, down = _sizes(tags)
    covered = -(-width // across) * across * -(-height // down) * down
    if covered - width * height > max_pixels:
        raise too_large(f"{covered / 1e6:.4g}", max_pixels)
    check_memory(held_bytes(image), max_pixels)


def held_bytes(image: Image.Image) -> int:
    """The memory that decoding an open TIFF takes, as libtiff decodes it, which takes more than Pillow."""
    tags: Mapping[int, Any] = vars(image)["tag_v2"]
    layout, (width, height, across, down) = _Layout(tags), _sizes(tags)
    if vars(image)["tile"][0].codec_name == "raw":  # by rows, or its blocks must be in the file
        across, down = min(across, width), min(down, height)
    pixel = 1 if image.mode in {"1", "L", "P"} else 4
    block = across * down * max(pixel, max(layout.bits) * max(len(layout.bits), layout.samples) / 8)
    # Turned by Pillow while libtiff keeps its copy; XMP may have an orientation too.
    turns = tags.get(ExifTags.Base.Orientation, 1) != 1 or TiffImagePlugin.XMP in tags
    return int(block + pixel * (1 + turns) * width * height)


def _check_jpegs(tags: Mapping[int, Any], raw: bytes) -> None:
    """Refuse a TIFF whose strips or tiles are JPEGs that lack pixels: libtiff would make them grey."""
    offsets = tags.get(TiffImagePlugin.STRIPOFFSETS) or tags.get(TiffImagePlugin.TILEOFFSETS) or ()
    counts = tags.get(TiffImagePlugin.STRIPBYTECOUNTS) or tags.get(TiffImagePlugin.TILEBYTECOUNTS) or ()
    *_, across, down = _sizes(tags)
    tables = bytes(tags.get(_JPEG_TABLES, b""))[:-2] or b"\xff\xd8"
    for offset, count in zip(offsets, counts, strict=False):
        check_inner_jpeg(tables + raw[offset + 2 : offset + count], across * down)
