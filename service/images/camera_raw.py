"""A camera's raw file: the largest preview in it that is large enough, or a refusal; never its thumbnail.

Most raw files are TIFFs. Their first directory often is a thumbnail, which a TIFF reader takes for the image.
Directories and tags: TIFF 6.0, TIFF/EP (ISO 12234-2), DNG 1.7.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from service.errors import InvalidImage
from service.images.header import LOSSLESS, jpeg_frame

_LEAST_PIXELS = 640 * 480  # of a preview; thumbnails have 160x120 to 570x375
_COMPRESSION, _PHOTOMETRIC, _STRIPS, _COUNTS, _ORIENTATION = 259, 262, 273, 279, 274
_SUB_DIRECTORIES, _JPEG_AT, _JPEG_BYTES, _DNG_VERSION = 330, 513, 514, 50706
_SENSOR = {32803, 34892}  # photometric interpretations: colour filter array, linear raw
_RAW_COMPRESSIONS = {32767, 32769, 32770, 34713, 65000, 65535}  # Sony, Epson, Samsung, Nikon, Kodak, Pentax
_JPEGS = {6, 7, 99, 34892}  # compressions by which previews are stored, the last with loss in DNG
_FORMS = {1: "B", 3: "H", 4: "I", 13: "I"}  # of a tag's values, by its type
_MOST_DIRECTORIES, _MOST_ENTRIES, _MOST_VALUES = 32, 512, 16
_CR2 = b"CR\x02"  # behind the header of a Canon's TIFF

_Directory = dict[int, tuple[int, ...]]  # values by tag


@dataclass(frozen=True, slots=True)
class Preview:
    """A JPEG inside a raw file, and the raw file's EXIF orientation, 1 to 8."""

    data: bytes
    orientation: int


def preview(raw: bytes) -> Preview | None:
    """The largest preview of a raw file; None for a TIFF that is none.

    Raises:
        InvalidImage: a raw file has no preview of at least 640x480 pixels.
    """
    directories = list(_directories(raw))
    if not (raw[8:11] == _CR2 or any(map(_is_raw, directories))):
        return None
    previews = {size: data for directory in directories for size, data in _jpegs(raw, directory)}
    if not previews or max(previews) < _LEAST_PIXELS:
        has = f"whose largest preview has {max(previews)} pixels" if previews else "without a preview"
        raise InvalidImage(
            f"not a supported image (camera raw {has}); send a rendered image, such as the camera's JPEG"
        )
    (orientation, *_) = directories[0].get(_ORIENTATION, (1,))
    return Preview(previews[max(previews)], orientation if orientation in range(1, 9) else 1)


def _is_raw(directory: _Directory) -> bool:
    sensor = _SENSOR.intersection(directory.get(_PHOTOMETRIC, ()))
    packed = _RAW_COMPRESSIONS.intersection(directory.get(_COMPRESSION, ()))
    return bool(sensor or packed or _DNG_VERSION in directory)


def _jpegs(raw: bytes, directory: _Directory) -> Iterator[tuple[int, bytes]]:
    """The pixels and bytes of each JPEG of a directory that programs show."""
    places = [(directory.get(_JPEG_AT, ()), directory.get(_JPEG_BYTES, ()))]
    if _JPEGS.intersection(directory.get(_COMPRESSION, ())):
        places.append((directory.get(_STRIPS, ()), directory.get(_COUNTS, ())))
    for offsets, counts in places:
        if len(offsets) == len(counts) == 1:
            data = raw[offsets[0] : offsets[0] + counts[0]]
            with suppress(struct.error, IndexError):
                marker, pixels = jpeg_frame(data) if data.startswith(b"\xff\xd8") else (0, 0)
                if pixels and marker not in LOSSLESS:
                    yield pixels, data


def _directories(raw: bytes) -> Iterator[_Directory]:
    """Each directory of a TIFF, the first one first, with those inside; ends where the file does not hold one."""
    order = "<" if raw[:2] == b"II" else ">"
    seen: set[int] = set()
    with suppress(struct.error):
        waiting = [*struct.unpack_from(order + "I", raw, 4)]
        while waiting and len(seen) < _MOST_DIRECTORIES:
            start = waiting.pop(0)
            if start in seen or not start:
                continue
            seen.add(start)
            directory, following = _directory(raw, order, start)
            waiting += [*directory.get(_SUB_DIRECTORIES, ()), following]
            yield directory


def _directory(raw: bytes, order: str, start: int) -> tuple[_Directory, int]:
    """The tags at `start` that hold integers, few in each, and where the next directory starts."""
    (count,) = struct.unpack_from(order + "H", raw, start)
    directory: _Directory = {}
    for at in range(start + 2, start + 2 + 12 * min(count, _MOST_ENTRIES), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", raw, at)
        if form := _FORMS.get(kind):
            form = f"{order}{min(values, _MOST_VALUES)}{form}"
            value_at = at + 8 if struct.calcsize(form) <= 4 else struct.unpack_from(order + "I", raw, at + 8)[0]  # noqa: PLR2004
            with suppress(struct.error):  # a value beyond the end of the file
                directory[tag] = struct.unpack_from(form, raw, value_at)
    (following,) = struct.unpack_from(order + "I", raw, start + 2 + 12 * count) if count <= _MOST_ENTRIES else (0,)
    return directory, following
