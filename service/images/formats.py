"""The pixels of each format but TIFF: all of them or an error, and as other programs show them where Pillow errs.

libjpeg fills missing pixels with grey and only warns, and Pillow drops its warnings. simplejpeg, with the same library,
reports them. A JPEG without an end marker is whole if nothing else is missing, so every file gets one.
"""

import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImagePalette

from service.errors import InvalidImage
from service.images.limits import BoundedReader, more_than
from service.images.resampling import opaque, strips

_END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan FF 00 is data, and FF D0 to FF D7 restart it
_MOST_SEGMENTS = 20_000
_BARE = {0x01, 0xD8, *range(0xD0, 0xD8)}  # markers without a segment
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE, _ARITHMETIC = {0xC2, 0xCA}, range(0xC9, 0xD0)
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_MAX_SCANNED_PIXELS = 2_000_000_000  # passes over the pixels of a JPEG, 0.3 s per billion; real ones make 10
_HALVED_PIXELS = 2**24  # above, a JPEG of several scans is read at half its sides: libjpeg keeps 8 bytes per pixel
# Words of libjpeg's warnings; its other warnings are about bytes that no pixel needs, or about the header.
_MISSING = ("premature end", "Premature end")
_DAMAGED = ("bad Huffman code", "instead of RST")
_SMALL_PIXELS = 2**21  # up to here the resampling wants three bytes per pixel, above it would be a copy too many
# Read in place of an end marker: libjpeg looks 8 bytes ahead, and of these 17 bits make no more than one value.
_LOOKED_AT = b"\xff\x00" * 8

_FEW_BITS = {"L;2": 2, "L;4": 4}  # Pillow's raw mode for a PNG: bits of a grey value

_MOST_GIF_BLOCKS = 2**17  # of up to 255 bytes, in the first frame: 33 MB; walking them takes 0.06 s

_EXTENDED_WEBP, _ANIMATED = b"VP8X", 2  # https://developers.google.com/speed/webp/docs/riff_container
_MOST_CHUNKS = 2**16
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 8  # bytes of a chunk's name and length
# An AVIF or HEIF may hold a larger frame than its header says, up to libavif's own limit of 268 megapixels, which costs
# a gigabyte and can't be known beforehand: one at a time, so that it is one gigabyte.
_ONE_AT_A_TIME = threading.Lock()

_OLDEST_BMP = 12  # bytes of its header; its palette has three bytes a colour
_BMP_WITH_ALPHA = 56  # bytes of the first header that has a mask for alpha, its last field
_BITFIELDS = 3  # the compression of which masks say where the colours lie
_HIGHEST_OF_16 = 0x8000
_INDEXED = {1: "P;1", 4: "P;4", 8: "P"}  # bits per pixel: Pillow's raw mode
_END_OF_ROW, _END_OF_BITMAP, _JUMP = range(3)  # behind a count of zero; from 3 on it is a number of plain pixels
_FROM_HEX = bytes.maketrans(b"0123456789abcdef", bytes(range(16)))
_MOST_RUNS = 2**18  # of a compressed BMP; they take half a second


class _Pixels(Image.Image):
    """An RGB image that is an array; Pillow's own copy, with four bytes a pixel, is made only when Pillow needs it."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        super().__init__()
        self._mode, self._size, self._pixels = "RGB", (pixels.shape[1], pixels.shape[0]), pixels

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._pixels.__array_interface__

    def load(self) -> Any:  # noqa: ANN401  Pillow's, whose name is private
        """Called by Pillow before everything that needs its own pixels."""
        if self._im is None:
            self.im = Image.fromarray(self._pixels).im
        return super().load()


def check_scans(image: Image.Image, raw: bytes, start: int) -> bool:
    """Refuse a JPEG with very many scans, or too few; the data of its first one begins at `start`.

    Returns whether libjpeg reads several, for which it keeps all coefficients.

    Raises:
        InvalidImage: libjpeg would pass over the pixels very often; a component has no scan, or a progressive one lacks
            the last bits of some coefficients; or it is coded arithmetically, where missing data looks like zeros.
    """
    layers, pixels = len(image.getbands()), image.width * image.height
    complete = raw.startswith(bytes((0xFF, 0xDA, 0, 6 + 2 * layers, layers)), max(0, start - 2 * layers - 8))
    # Where all layers are in the first scan, libjpeg reads no other.
    if several := not complete or "progressive" in image.info:
        limit = _MAX_SCANNED_PIXELS // max(pixels, 1_000_000)
        if more_than(limit, rb"\xff[\xda]", raw):  # [] halves the time of the search
            raise InvalidImage(f"corrupt JPEG: more than {limit} scans")
    _check_coefficients(raw)
    return several


def least_reduction(image: Image.Image, *, several_scans: bool) -> int:
    """By how much the sides of a JPEG must be reduced at least, so that it fits into memory: 1 or 2."""
    return 2 if several_scans and image.width * image.height > _HALVED_PIXELS else 1


def _check_coefficients(raw: bytes) -> None:
    frame, components = 0, b""
    whole: set[tuple[int, int]] = set()  # components, and those of their 64 coefficients that have all bits
    for marker, body, _ in _segments(raw):
        if marker in _FRAMES and not frame:
            if marker in _ARITHMETIC:
                raise InvalidImage("not a supported image (JPEG with arithmetic coding); save it with Huffman coding")
            frame, components = marker, body[6 : 6 + 3 * body[5] : 3]
        elif marker == _START_OF_SCAN and body:
            ids, (first, last, bits) = body[1 : 1 + 2 * body[0] : 2], body[1 + 2 * body[0] :][:3]
            if frame not in _PROGRESSIVE:
                if set(ids) == set(components):
                    return
                first, last, bits = 0, 63, 0
            if bits & 15 == 0:  # the lowest bit in it
                whole |= {(component, k) for component in ids for k in range(first, last + 1)}
    if not whole.issuperset((component, k) for component in components for k in range(64)):
        raise InvalidImage("truncated JPEG: its last scans are missing")


def load_jpeg(image: Image.Image, raw: bytes, reduction: int) -> Image.Image:
    """The pixels of an open JPEG at 1/`reduction` of its sides, in mode L, CMYK, RGB or, where it is large, RGBX.

    Raises:
        OSError: some of its data is missing or damaged.
    """
    raw, size = _ended(raw), {}
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
        size = {"min_height": image.height, "min_width": image.width, "min_factor": reduction}
    large = image.width * image.height > _SMALL_PIXELS
    mode = image.mode if image.mode in {"L", "CMYK"} else "RGBX" if large else "RGB"
    try:
        if simplejpeg.decode_jpeg_header(raw, **size)[:2] != (image.height, image.width):
            return _load_tolerantly(image, raw)  # before memory is taken for another size than was checked
        pixels = simplejpeg.decode_jpeg(raw, "GRAY" if mode == "L" else mode, **size)
    except (ValueError, KeyError) as error:  # KeyError: a subsampling that it has no name for, such as 4:4:1
        _refuse_damage(error)
        return _load_tolerantly(image, raw)
    if mode == "RGB":
        return _Pixels(pixels)
    if mode == "CMYK":  # stored inverted, as Adobe does
        pixels ^= 255
    return Image.frombuffer(mode, image.size, pixels, "raw", mode, 0, 1)  # without a copy


def check_inner_jpeg(raw: bytes, most: int) -> None:
    """Refuse a JPEG inside another file that lacks pixels, or has more than `most`."""
    raw = _ended(raw)
    with suppress(ValueError, KeyError):  # a file that simplejpeg can't read is checked by its decoder
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
        if height * width > most:
            raise InvalidImage("corrupt JPEG: it is larger than its place in the file that it is in")
        try:
            simplejpeg.decode_jpeg(raw, "CMYK" if colours in {"CMYK", "YCCK"} else "RGB", min_factor=8)
        except ValueError as error:
            _refuse_damage(error)


def _ended(raw: bytes) -> bytes:
    return raw if raw.endswith(_END) else raw + _END


def _refuse_damage(error: Exception) -> None:
    """Raise OSError, as Pillow would, if libjpeg's warning means that pixels are missing."""
    warning = str(error).removeprefix("Corrupt JPEG data: ")
    if any(words in warning for words in _MISSING):
        raise OSError(f"image file is truncated ({warning})") from error
    if any(words in warning for words in _DAMAGED):
        raise OSError(warning) from error


def _load_tolerantly(image: Image.Image, raw: bytes) -> Image.Image:
    """Load with Pillow, where libjpeg has other warnings or simplejpeg does not support the subsampling of colours.

    Without an end marker, libjpeg waits for more data when it has read all of a scan and misses pixels, and Pillow
    refuses the file; when it misses none it ends. For several scans it needs the marker.
    """
    starts = [end for marker, _, end in _segments(raw) if marker == _START_OF_SCAN]
    if len(starts) == 1 and (end := _MARKER.search(raw, starts[0])):
        raw = raw[: end.start()] + _LOOKED_AT
    vars(image)["fp"] = BoundedReader(raw)
    image.load()
    return image


def _segments(raw: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, body (without its length) and end of each segment up to the end of the image."""
    position = 2
    for _ in range(_MOST_SEGMENTS):
        if not (found := _MARKER.search(raw, position)) or (marker := raw[found.end() - 1]) == _END_OF_IMAGE:
            return
        start = position = found.end()
        if marker not in _BARE:
            position += int.from_bytes(raw[start : start + 2])
            yield marker, raw[start + 2 : position], position
    raise InvalidImage("corrupt JPEG: too many segments")


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


def load_avif(image: Image.Image, _: bytes) -> Image.Image:
    """The first frame, without the copies that Pillow keeps."""
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
