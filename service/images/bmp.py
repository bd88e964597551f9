"""BMPs as Windows shows them, where Pillow reads them otherwise."""

from typing import Any

from PIL import Image, ImagePalette

from service.errors import InvalidImage
from service.images.limits import BoundedReader

_CORE = 12  # bytes of the oldest header, whose palette has three bytes a colour
_WITH_ALPHA = 56  # bytes of the first header that has a mask for alpha, its last field
_BITFIELDS = 3  # the compression of which masks say where the colours lie
_HIGHEST_OF_16 = 0x8000
_END_OF_ROW, _END_OF_BITMAP, _JUMP = range(3)  # behind a count of zero; from 3 on it is a number of plain pixels
_FROM_HEX = bytes.maketrans(b"0123456789abcdef", bytes(range(16)))
_MOST_RUNS = 2**18  # of a compressed one; they take half a second
_INDEXED = {1: "P;1", 4: "P;4", 8: "P"}  # bits per pixel: Pillow's raw mode


def load_bmp(image: Image.Image) -> Image.Image:
    """The pixels; opaque where the file has an alpha that is zero everywhere, which most writers mean nothing by."""
    _keep_palette(image)
    _keep_alpha(image)
    _unpack(image)
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


def _unpack(image: Image.Image) -> None:
    """Replaces run lengths by pixels: Pillow loses rows that hold nothing but their end, and reads few runs."""
    opened: dict[str, Any] = vars(image)
    tile = opened["tile"][0]
    if tile.codec_name != "bmp_rle":
        return
    packed = memoryview(opened["fp"].getvalue())[tile.offset :]
    opened["fp"] = BoundedReader(_unpacked(packed, *image.size, nibbles=tile.args[1]))
    opened["tile"] = [tile._replace(codec_name="raw", offset=0, args=(image.mode, 0, tile.args[-1]))]


def _unpacked(packed: memoryview, width: int, height: int, *, nibbles: bool) -> bytearray:
    """One byte for each pixel, in the file's order of rows; what a row or a jump leaves out is index 0."""
    pixels, last = bytearray(width * height), len(packed) - 2
    x = y = at = 0
    for _ in range(_MOST_RUNS):
        if y >= height or (y == height - 1 and x >= width):
            return pixels
        if at > last or (not (count := packed[at]) and packed[at + 1] == _END_OF_BITMAP):
            break
        value, at = packed[at + 1], at + 2
        if not count and value == _END_OF_ROW:
            x, y = 0, y + 1
        elif not count and value == _JUMP and at <= last:
            x, y, at = x + packed[at], y + packed[at + 1], at + 2
        else:
            length, run = count or value, packed[at - 1 : at]
            if not count:
                run = packed[at : at + (-(-length // 2) if nibbles else length)]
                at += len(run) + len(run) % 2
            values = run.hex().encode().translate(_FROM_HEX) if nibbles else run.tobytes()
            values *= -(-length // len(values)) if count else 1
            if len(values) < length:
                break
            kept = values[: max(0, min(length, width - x))]
            pixels[y * width + x : y * width + x + len(kept)] = kept
            x += len(kept)
    else:
        raise InvalidImage("not a supported image (BMP of too many runs); save it without compression")
    raise InvalidImage("truncated BMP: its last rows are missing")
