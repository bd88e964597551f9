"""The pixels of formats but JPEG and TIFF: all of them or an error, as other programs show them where Pillow errs."""

import struct
import threading
import zlib

import numpy as np
from PIL import Image, ImagePalette

from service.errors import InvalidImage
from service.images.av1 import check_frames
from service.images.limits import BoundedReader
from service.images.resampling import opaque, strips

_FEW_BITS = {"L;2": 2, "L;4": 4}  # Pillow's raw mode for a PNG: bits of a grey value

_MOST_GIF_BLOCKS = 2**17  # of up to 255 bytes, in the first frame: 33 MB; walking them takes 0.06 s

_EXTENDED_WEBP, _ANIMATED = b"VP8X", 2  # https://developers.google.com/speed/webp/docs/riff_container
_MOST_CHUNKS = 2**16
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 8  # bytes of a chunk's name and length
# A HEIF may hold a larger frame than its header says, and so may a frame of an AVIF than its sequence header, up to
# libavif's own limit of 268 megapixels, which costs a gigabyte: one at a time, so that it is one gigabyte.
_ONE_AT_A_TIME = threading.Lock()

_OLDEST_BMP = 12  # bytes of its header; its palette has three bytes a colour
_BMP_WITH_ALPHA = 56  # bytes of the first header that has a mask for alpha, its last field
_BITFIELDS = 3  # the compression of which masks say where the colours lie
_HIGHEST_OF_16 = 0x8000
_INDEXED = {1: "P;1", 4: "P;4", 8: "P"}  # bits per pixel: Pillow's raw mode
_END_OF_ROW, _END_OF_BITMAP, _JUMP = range(3)  # behind a count of zero; from 3 on it is a number of plain pixels
_FROM_HEX = bytes.maketrans(b"0123456789abcdef", bytes(range(16)))
_MOST_RUNS = 2**18  # of a compressed BMP; they take half a second


def load_png(image: Image.Image, raw: bytes) -> Image.Image:
    """The pixels of an open PNG; what comes behind them is not read, so it may be missing.

    Pillow compares a transparent colour with what it has made of the pixels: greys of 2 and 4 bits are spread over 8
    by then, and colours of 16 bits have lost 8. The first is set right, and in the second what is transparent is
    painted white.
    """
    raw_mode, key = vars(image)["tile"][0].args, image.info.get("transparency")
    vars(image)["load_end"] = lambda: None
    image.load()
    if raw_mode in _FEW_BITS and isinstance(key, int):
        most = 2 ** _FEW_BITS[raw_mode] - 1
        image.info["transparency"] = (key & most) * (255 // most)
    elif raw_mode == "RGB;16B" and isinstance(key, tuple):  # of which Pillow keeps the high bytes
        with Image.open(BoundedReader(raw), formats=("PNG",)) as low:
            vars(low).update(tile=[vars(low)["tile"][0]._replace(args="RGB;16L")], load_end=lambda: None)
            low.load()
            for box in strips(image):
                above, below = (np.asarray(each.crop(box)) for each in (image, low))
                found = ((above == np.array(key) >> 8) & (below == np.array(key) & 255)).all(axis=2)
                image.paste("white", box, Image.fromarray(found))
        del image.info["transparency"]
    return image


def late_exif(raw: bytes) -> bytes:
    """The EXIF block of a PNG, wherever it stands; Pillow has not seen one behind the pixels yet."""
    at = len(_PNG)
    for _ in range(_MOST_CHUNKS):
        size, name = int.from_bytes(raw[at : at + 4]), raw[at + 4 : at + _HEAD]
        if name in {b"eXIf", b"IEND", b""}:
            body = raw[at + _HEAD : at + _HEAD + size]
            whole = raw[at + _HEAD + size : at + _HEAD + size + 4] == zlib.crc32(name + body).to_bytes(4)
            return body if whole and name == b"eXIf" else b""
        at += _HEAD + size + 4
    return b""


def load_gif(image: Image.Image, raw: bytes) -> Image.Image:
    """The first frame, on white where it does not cover the canvas, as browsers show it on a white page."""
    opened = vars(image)
    frame, end = opened["tile"][0].extents, opened["tile"][0].offset
    for _ in range(_MOST_GIF_BLOCKS):
        if end >= len(raw) or not raw[end]:
            break
        end += 1 + raw[end]
    else:
        raise InvalidImage("corrupt GIF: too many blocks")
    opened["fp"] = BoundedReader(raw[:end])  # else Pillow takes the next frame for pixels that this one lacks
    image.load()
    if frame == (0, 0, *image.size):
        return image
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(opaque(image.crop(frame)), frame[:2])
    return canvas


def without_cut_chunk(raw: bytes) -> bytes:
    """A WebP without a last chunk that is cut, such as metadata or another frame: libwebp reads only whole files."""
    if raw[12:16] != _EXTENDED_WEBP or len(raw) >= _HEAD + int.from_bytes(raw[4:8], "little"):
        return raw
    end = 12
    for _ in range(_MOST_CHUNKS):
        size = int.from_bytes(raw[end + 4 : end + 8], "little")
        following = end + _HEAD + size + size % 2
        if end + _HEAD > len(raw) or following > len(raw):
            break
        end = following
    return raw[:4] + struct.pack("<I", end - _HEAD) + raw[8:end]


def load_webp(image: Image.Image, raw: bytes) -> Image.Image:
    """The first frame, without the copies that Pillow keeps, up to five."""
    frame = vars(image).pop("_decoder").get_next()  # and is then freed with its canvases
    if frame is None:
        raise InvalidImage("corrupt WebP: its first frame can not be decoded")
    # A frame of several may not cover the canvas. Another's mode may be RGBX, then without transparency.
    animated = raw[12:16] == _EXTENDED_WEBP and raw[20] & _ANIMATED
    return _from_bytes(image, frame[0], "RGBA" if animated else vars(image)["rawmode"])


def load_avif(image: Image.Image, raw: bytes) -> Image.Image:
    """The first frame, without the copies that Pillow keeps; none that is larger than the header says is decoded."""
    check_frames(raw, *image.size)
    decoder = vars(image).pop("_decoder")
    with _ONE_AT_A_TIME:
        frame = decoder.get_frame(0)
    del decoder  # with its canvases
    return _from_bytes(image, frame[0], image.mode)


def register_heif() -> None:
    """Let Pillow open HEIF, of which it reads the image alone: no thumbnails, depth maps and other auxiliary images."""
    import pillow_heif  # noqa: PLC0415  an extra

    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def load_heif(image: Image.Image, _: bytes) -> Image.Image:
    """The primary image as libheif turns it, without the copies that its plugin keeps."""
    opened = vars(image)
    frame = opened["_heif_file"][image.tell()]
    with _ONE_AT_A_TIME:
        pixels, stride = frame.data, frame.stride
    if frame.size != image.size:
        raise InvalidImage("corrupt HEIF: its image has another size than its header says")
    return Image.frombuffer(image.mode, image.size, pixels, "raw", image.mode, stride, 1)


def _from_bytes(image: Image.Image, pixels: bytes, mode: str) -> Image.Image:
    return Image.frombuffer(mode, image.size, pixels, "raw", mode, 0, 1)


def load_bmp(image: Image.Image, raw: bytes) -> Image.Image:
    """The pixels as Windows shows them; opaque where alpha is zero everywhere, which most writers mean nothing by."""
    opened, size = vars(image), int.from_bytes(raw[14:18], "little")
    masked = size >= _BMP_WITH_ALPHA and image.info["compression"] == _BITFIELDS
    if masked and raw[66:70] == _HIGHEST_OF_16.to_bytes(4, "little") and opened["tile"][0].args[0] == "BGR;15":
        opened["_mode"] = "RGBA"  # Pillow drops an alpha of one bit
        _set_raw_mode(image, "BGRA;15")
    _keep_palette(image, raw, size)
    tile = opened["tile"][0]
    if tile.codec_name == "bmp_rle":  # Pillow loses rows that hold nothing but their end, and reads few runs
        pixels = _without_runs(memoryview(raw)[tile.offset :], *image.size, nibbles=tile.args[1])
        opened["fp"] = BoundedReader(pixels)
        opened["tile"] = [tile._replace(codec_name="raw", offset=0, args=(image.mode, 0, tile.args[-1]))]
    image.load()
    clear = image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)
    return image.convert("RGB") if clear else image


def _set_raw_mode(image: Image.Image, raw_mode: str) -> None:
    tile = vars(image)["tile"][0]
    vars(image)["tile"] = [tile._replace(args=(raw_mode, *tile.args[1:]))]


def _keep_palette(image: Image.Image, raw: bytes, header_bytes: int) -> None:
    """Pillow drops a palette that is grey, and then takes the indices for that grey whatever their bits."""
    oldest = header_bytes == _OLDEST_BMP
    bits = int.from_bytes(raw[24:26] if oldest else raw[28:30], "little")
    if image.mode not in {"1", "L"} or (image.mode, bits) in {("1", 1), ("L", 8)}:
        return
    entry, colours = (3, 0) if oldest else (4, int.from_bytes(raw[46:50], "little"))
    start = 14 + header_bytes
    vars(image)["_mode"] = "P"
    image.palette = ImagePalette.raw("BGR" if oldest else "BGRX", raw[start : start + entry * (colours or 1 << bits)])
    if vars(image)["tile"][0].codec_name == "raw":
        _set_raw_mode(image, _INDEXED[bits])


def _without_runs(packed: memoryview, width: int, height: int, *, nibbles: bool) -> bytearray:
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
