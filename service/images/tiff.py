"""Which TIFFs are read, and the meaning of their samples.

Pillow's table of TIFFs lacks some kinds that it can read, and is wrong for some that it lists; both are corrected here.
All other kinds are refused with a description.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImagePalette, TiffImagePlugin
from PIL.ImageFile import _Tile

from service.errors import InvalidImage
from service.images.jpeg import check_pixels, ended
from service.images.limits import BoundedReader, check_tiles
from service.images.visible import Grey

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _YCBCR = 0, 1, 6
_BYTE = 8  # bits
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_SEPARATE = 2
_LOWEST_BIT_FIRST = 2
_JPEG = 7
_JPEG_TABLES = 347
_DEEP = {  # sample format and bits: Pillow's mode, and its raw mode by byte order
    (_SIGNED, 8): ("L", {b"II": "L", b"MM": "L"}),
    (_UNSIGNED, 12): ("I;16", {b"II": "I;12", b"MM": "I;12"}),
    (_SIGNED, 16): ("I", {b"II": "I;16S", b"MM": "I;16BS"}),
    (_UNSIGNED, 32): ("I", {b"II": "I;32S", b"MM": "I;32BS"}),
    (_SIGNED, 32): ("I", {b"II": "I;32S", b"MM": "I;32BS"}),
    (_FLOAT, 32): ("F", {b"II": "F;32F", b"MM": "F;32BF"}),
    (_FLOAT, 64): ("F", {b"II": "F;64F", b"MM": "F;64BF"}),
}
_NATIVE = {  # Pillow's raw modes for samples that libtiff has decoded, which are in the machine's byte order
    "I;16": "I;16N",
    "I;16B": "I;16N",
    "I;16BS": "I;16NS",
    "I;32BS": "I;32NS",
    "F;32BF": "F;32NF",
    "F;64BF": "F;64NF",
    "I;16S": "I;16NS",
    "I;32S": "I;32NS",
    "F;32F": "F;32NF",
    "F;64F": "F;64NF",
}
# the type of the samples where the mode's is another
_TYPES: dict[tuple[int, int], np.dtype[Any]] = {(_SIGNED, 8): np.dtype(np.int8), (_UNSIGNED, 32): np.dtype(np.uint32)}

_PHOTOMETRICS = {0: "grey with white as zero", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "untyped", 5: "complex", 6: "complex"}


def _complete_table() -> None:
    """Add deep grey to Pillow's table, in both byte orders and directions."""
    table = TiffImagePlugin.OPEN_INFO
    for order, photometric in product((b"II", b"MM"), (_WHITE_IS_ZERO, _BLACK_IS_ZERO)):
        for (form, bits), (mode, raw_modes) in _DEEP.items():
            table[order, photometric, (form,), 1, (bits,), ()] = mode, raw_modes[order]
        for fill, raw_mode in ((1, sixteen := "I;16" if order == b"II" else "I;16B"), (2, "I;16R")):
            table[order, photometric, (_UNSIGNED,), fill, (16,), ()] = sixteen, raw_mode


_complete_table()


class _Layout(NamedTuple):
    """The tags that describe the samples; where one is missing, TIFF's default."""

    photometric: int
    form: int
    bits: tuple[int, ...]
    samples: int
    planar: int

    @property
    def described(self) -> str:
        """In words."""
        kind = _PHOTOMETRICS.get(self.photometric, f"photometric {self.photometric}")
        bits = ", ".join(map(str, sorted(set(self.bits))))
        planes = ", in separate planes" if self.planar == _SEPARATE and self.samples > 1 else ""
        form = _FORMATS.get(self.form, f"format {self.form}")
        samples = "sample" if self.samples == 1 else "samples"
        return f"{kind}: {self.samples} {form} {samples} of {bits} bits{planes}"


def _layout(tags: Mapping[int, Any]) -> _Layout:
    return _Layout(
        tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0),
        tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0],
        tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)),
        tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1),
        tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1),
    )


def describe(raw: bytes) -> str:
    """The kind of a TIFF that Pillow does not read, in words.

    Raises:
        Exception: whatever Pillow raises on tags that it can't read.
    """
    tags = TiffImagePlugin.ImageFileDirectory_v2(raw[:8])
    (stream := BoundedReader(raw)).seek(tags.next)
    tags.load(stream)
    compression = tags.get(TiffImagePlugin.COMPRESSION, 1)
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        return f"TIFF with compression {compression}"
    return f"TIFF of {_layout(tags).described}"


def prepare(image: Image.Image, raw: bytes, max_pixels: int) -> Grey | None:
    """Check an open TIFF before it is decoded; returns the meaning of its samples, if they are deep grey.

    Raises:
        InvalidImage: Pillow would decode it wrongly, or pixels of a JPEG inside are missing.
    """
    vars(image)["is_animated"] = True  # keeps Pillow from reading all its EXIF, which may take seconds
    tags: Mapping[int, Any] = vars(image)["tag_v2"]
    layout = _layout(tags)
    if layout.planar == _SEPARATE and image.mode in {"LA", "La", "PA", "LAB"}:
        raise InvalidImage(f"not a supported image (TIFF of {layout.described})")
    if vars(image)["tile"][0].codec_name == "raw":
        _check_offsets(tags, layout)
    _choose_decoder(image, layout)
    check_tiles(image, max_pixels)
    if tags.get(TiffImagePlugin.COMPRESSION) == _JPEG:
        _check_jpegs(tags, raw)
    if image.palette and max(colours := tags[TiffImagePlugin.COLORMAP]) < 256:  # noqa: PLR2004
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))  # of 8 bits, where the standard has 16
    if image.mode[0] not in "IF" and (layout.form, layout.bits[0]) not in _TYPES:
        return None
    white = 2 ** layout.bits[0] - 1 if image.mode.startswith("I;16") else None
    stored = _TYPES.get((layout.form, layout.bits[0]))
    inverted, rounded = layout.photometric == _WHITE_IS_ZERO, (layout.form, layout.bits[0]) == (_FLOAT, 64)
    return Grey(white, stored, inverted=inverted, rounded=rounded)


def _choose_decoder(image: Image.Image, layout: _Layout) -> None:
    """Make libtiff decode files that Pillow would decode wrongly, and Pillow interpret libtiff's samples correctly."""
    opened = vars(image)
    codec, _, _, (raw_mode, *_) = opened["tile"][0]
    separate = layout.planar == _SEPARATE and layout.samples > 1
    if codec == "libtiff":
        raw_mode = _NATIVE.get(raw_mode, raw_mode)
    elif layout.photometric == _YCBCR:
        opened["_mode"], raw_mode = "RGB", "RGBX"  # libtiff converts it
    elif separate and (layout.bits[0] > _BYTE or image.mode == "RGBA"):
        raw_mode = image.mode if layout.bits[0] == _BYTE else f"{image.mode};16N"
    elif opened["tag_v2"].get(TiffImagePlugin.FILLORDER) == _LOWEST_BIT_FIRST:
        raw_mode = raw_mode.removesuffix("R").removesuffix(";")  # libtiff has turned the bits by then
        raw_mode = _NATIVE.get(raw_mode, raw_mode)
    else:
        return
    opened["use_load_libtiff"] = True
    opened["tile"] = [_Tile("libtiff", (0, 0, *opened["_tile_size"]), 0, (raw_mode, False, opened["tag_v2"].offset))]


def _check_offsets(tags: Mapping[int, Any], layout: _Layout) -> None:
    """Refuses an uncompressed TIFF that lacks strips or tiles: Pillow makes them black, or takes the header for one."""
    width, height = (tags[side] for side in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
    if offsets := tags.get(TiffImagePlugin.STRIPOFFSETS, ()):
        across, down = width, min(height, tags.get(TiffImagePlugin.ROWSPERSTRIP, height))
    else:
        offsets = tags.get(TiffImagePlugin.TILEOFFSETS, ())
        across, down = tags.get(TiffImagePlugin.TILEWIDTH, width), tags.get(TiffImagePlugin.TILELENGTH, height)
    planes = layout.samples if layout.planar == _SEPARATE else 1
    needed = -(-width // across) * -(-height // down) * planes
    if missing := needed - sum(offset > 0 for offset in offsets[:needed]):
        raise InvalidImage(f"truncated TIFF: {missing} of its {needed} strips or tiles are missing")


def _check_jpegs(tags: Mapping[int, Any], raw: bytes) -> None:
    """Refuse a TIFF whose strips or tiles are JPEGs that lack pixels: libtiff would make them grey."""
    offsets = tags.get(TiffImagePlugin.STRIPOFFSETS) or tags.get(TiffImagePlugin.TILEOFFSETS) or ()
    counts = tags.get(TiffImagePlugin.STRIPBYTECOUNTS) or tags.get(TiffImagePlugin.TILEBYTECOUNTS) or ()
    width, height = (tags[side] for side in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
    rows = min(height, tags.get(TiffImagePlugin.ROWSPERSTRIP, height))
    most = tags.get(TiffImagePlugin.TILEWIDTH, width) * tags.get(TiffImagePlugin.TILELENGTH, rows)
    tables = bytes(tags.get(_JPEG_TABLES, b""))[:-2] or b"\xff\xd8"
    for offset, count in zip(offsets, counts, strict=False):
        check_pixels(ended(tables + raw[offset + 2 : offset + count]), most)
