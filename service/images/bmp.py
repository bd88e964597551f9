"""BMPs as Windows shows them, where Pillow reads them otherwise."""

from typing import Any

from PIL import Image, ImagePalette

_CORE = 12  # bytes of the oldest header, whose palette has three bytes a colour
_INDEXED = {1: "P;1", 4: "P;4", 8: "P"}  # bits per pixel: Pillow's raw mode


def load_bmp(image: Image.Image) -> Image.Image:
    """The pixels; opaque where the file has an alpha that is zero everywhere, which most writers mean nothing by."""
    _keep_palette(image)
    image.load()
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")
    return image


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
