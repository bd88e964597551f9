"""BMPs as Windows shows them, where Pillow reads them otherwise."""

from typing import Any

from PIL import Image, ImagePalette

_CORE = 12  # bytes of the oldest header, whose palette has three bytes a colour
_WITH_ALPHA = 56  # bytes of the first header that has a mask for alpha, its last field
_BITFIELDS = 3  # the compression of which masks say where the colours lie
_HIGHEST_OF_16 = 0x8000
_INDEXED = {1: "P;1", 4: "P;4", 8: "P"}  # bits per pixel: Pillow's raw mode


def load_bmp(image: Image.Image) -> Image.Image:
    """The pixels; opaque where the file has an alpha that is zero everywhere, which most writers mean nothing by."""
    _keep_palette(image)
    _keep_alpha(image)
    image.load()
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")
    return image


def _keep_alpha(image: Image.Image) -> None:
    """Pillow drops the alpha of one bit that a header of 56 bytes and more may give to a pixel of 16."""
    opened: dict[str, Any] = vars(image)
    header, tile = opened["fp"].getvalue()[14 : 14 + _WITH_ALPHA], opened["tile"][0]
    size, mask = int.from_bytes(header[:4], "little"), int.from_bytes(header[-4:], "little")
    masked = size >= _WITH_ALPHA and image.info["compression"] == _BITFIELDS
    if masked and mask == _HIGHEST_OF_16 and tile.args[0] == "BGR;15":
        opened["_mode"], opened["tile"] = "RGBA", [tile._replace(args=("BGRA;15", *tile.args[1:]))]


def _keep_palette(image: Image.Image) -> None:
    """Pillow drops a palette that is grey, and then takes the indices for that grey whatever their bits."""
    opened: dict[str, Any] = vars(image)
    file, tile = opened["fp"], opened["tile"][0]
    header = file.getvalue()[14:54]
    core = int.from_bytes(header[:4], "little") == _CORE
    bits = int.from_bytes(header[10:12] if core else header[14:16], "little")
    if image.mode not in {"1", "L"} or (image.mode, bits) in {("1", 1), ("L", 8)}:
        return
    entry, colours = 3 if core else 4, 0 if core else int.from_bytes(header[32:36], "little")
    start = 14 + int.from_bytes(header[:4], "little")
    palette = file.getvalue()[start : start + entry * (colours or 1 << bits)]
    opened["_mode"] = "P"
    image.palette = ImagePalette.raw("BGR" if core else "BGRX", palette)
    raw_mode = _INDEXED[bits] if tile.codec_name == "raw" else tile.args[0]
    opened["tile"] = [tile._replace(args=(raw_mode, *tile.args[1:]))]
