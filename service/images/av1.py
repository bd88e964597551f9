"""How large the frames of an AVIF are by their own AV1 headers, before any is decoded: the file's header may lie.

Read are the boxes that lead to the frames (ISO 14496-12; https://aomediacodec.github.io/av1-avif/) and of each frame
the sequence header (AV1 specification, 5.5: https://aomediacodec.github.io/av1-spec/).
"""

import struct
from collections.abc import Iterator

from service.errors import InvalidImage

_MOST_BOXES = 10_000  # of a header, and of a frame's OBUs; walking them takes 0.01 s
_MOST_METAS = 8  # the file's, and those of tracks
_MOST_EXTENTS = 4096  # pieces of all items: the tiles of a grid, and what belongs to them
_SEQUENCE_HEADER = 1  # type of an OBU
_HEADER_BYTES = 512  # of a sequence header; 32 operating points take fewer
_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}
_IN_IDAT = 1  # construction method: the data lie in a box of the header
_TIERS = 7  # levels above have two


def check_frames(raw: bytes, width: int, height: int) -> None:
    """Raises InvalidImage where a frame of the AVIF `raw`, whose header says width x height, is larger than that."""
    try:
        sizes = [size for data in _frames(raw) for size in _sizes(data)]
    except (struct.error, IndexError, ValueError) as error:
        raise InvalidImage("corrupt AVIF: the boxes that lead to its frame are broken") from error
    if not sizes:
        raise InvalidImage("corrupt AVIF: its frame does not begin with a sequence header")
    across, down = max(sizes, key=lambda size: size[0] * size[1])
    if across * down > width * height:
        raise InvalidImage(f"corrupt AVIF: its frame has {across}x{down} pixels, and its header says {width}x{height}")


def _frames(raw: bytes) -> Iterator[bytes]:
    """The coded data of each still image, and of the first frame of each track."""
    metas = _bounded(_MOST_METAS, "headers")
    sample, offset = 0, 0  # of the first frame of a track: its bytes and where they begin
    for name, start, end in _boxes(raw, 0, len(raw)):
        if name == b"meta":
            next(metas)
            yield from _items(raw, {kind: (first, last) for kind, first, last in _boxes(raw, start + 4, end)})
        elif name == b"trak":
            sample = offset = 0
        elif name == b"stsz":
            same, _, first = struct.unpack_from(">III", raw, start + 4)
            sample = same or first
        elif name in {b"stco", b"co64"}:
            offset = struct.unpack_from(">I" if name == b"stco" else ">Q", raw, start + 8)[0]
        if sample and offset:
            yield raw[offset : offset + sample]
            sample = 0


def _boxes(raw: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each box; those of a movie are looked into."""
    for _ in _bounded(_MOST_BOXES, "boxes"):
        if start + 8 > end:
            return
        size, name = struct.unpack_from(">I4s", raw, start)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", raw, start + 8)[0], 16
        last = min(end, start + size) if size else end
        if last < start + head:
            return
        yield name, start + head, last
        start = start + head if name in _PARENTS else last  # what is inside comes next, then what follows


def _items(raw: bytes, boxes: dict[bytes, tuple[int, int]]) -> Iterator[bytes]:
    """The data of the items of type `av01`, of the `boxes` of a `meta`."""
    if not {b"iloc", b"iinf"} <= {*boxes}:
        return
    coded = _coded_items(raw, *boxes[b"iinf"])
    at = boxes[b"iloc"][0]
    version, sizes = raw[at], int.from_bytes(raw[at + 4 : at + 6])
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    wide = 4 if version > 1 else 2
    reader = _Bytes(raw, at + 6)
    extents, left = _bounded(_MOST_EXTENTS, "pieces"), 2 * len(raw)  # pieces may be shared, hardly more often
    for _ in zip(range(reader.take(wide)), _bounded(_MOST_EXTENTS, "items"), strict=False):
        item = reader.take(wide)
        method = reader.take(2) & 15 if version else 0
        reader.take(2)
        base = reader.take(base_size)
        if method == _IN_IDAT:
            base += boxes[b"idat"][0] if b"idat" in boxes else len(raw)
        parts = []
        for _ in zip(range(reader.take(2)), extents, strict=False):
            reader.take(index_size if version else 0)
            start, length = base + reader.take(offset_size), reader.take(length_size)
            parts.append(memoryview(raw)[start : start + length if length else None])
        if item in coded:
            left -= sum(map(len, parts))
            if left < 0:
                raise ValueError("the items have more bytes than the file")
            yield b"".join(parts)


def _coded_items(raw: bytes, start: int, end: int) -> set[int]:
    """Those that an `iinf` calls `av01`."""
    found = set()
    for name, at, _ in _boxes(raw, start + (8 if raw[start] else 6), end):
        wide = 4 if raw[at] > 2 else 2  # noqa: PLR2004  the version of an `infe`
        if name == b"infe" and raw[at + 6 + wide : at + 10 + wide] == b"av01":
            found.add(int.from_bytes(raw[at + 4 : at + 4 + wide]))
    return found


def _sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Width and height in each sequence header of a frame's OBUs (AV1 specification, 5.3)."""
    at, counted = 0, _bounded(_MOST_BOXES, "OBUs")
    while at < len(data):
        next(counted)
        head = data[at]
        at += 2 if head & 4 else 1
        size = len(data) - at
        if head & 2:
            size = shift = 0
            while shift < 56:  # noqa: PLR2004  eight bytes of seven bits
                size |= (data[at] & 127) << shift
                at, shift, more = at + 1, shift + 7, data[at] & 128
                if not more:
                    break
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            yield _largest_frame(data[at : at + min(size, _HEADER_BYTES)])
        at += size


def _largest_frame(header: bytes) -> tuple[int, int]:
    """The largest width and height that a sequence header allows its frames."""
    bits = _Bits(header)
    bits.take(4)  # profile, still
    if bits.take(1):  # the reduced header of a still image
        bits.take(5)
    else:
        _skip_operating_points(bits)
    across, down = bits.take(4) + 1, bits.take(4) + 1
    return bits.take(across) + 1, bits.take(down) + 1


def _skip_operating_points(bits: "_Bits") -> None:
    delay = 0
    if bits.take(1):  # timing
        bits.take(64)
        if bits.take(1):
            zeros = 0
            while not bits.take(1):
                zeros += 1
            bits.take(zeros)
        if bits.take(1):  # decoder model
            delay = bits.take(5) + 1
            bits.take(42)
    displays = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > _TIERS:
            bits.take(1)
        if delay and bits.take(1):
            bits.take(2 * delay + 1)
        if displays and bits.take(1):
            bits.take(4)


def _bounded(most: int, what: str) -> Iterator[int]:
    """Counts up to `most`, then raises ValueError: more of `what` are no image's."""
    yield from range(most)
    raise ValueError(f"too many {what}")


class _Bytes:
    """Reads numbers of so many bytes, one after another."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        # Mutable state: where the next one begins.
        self._at = at

    def take(self, count: int) -> int:
        """The next number of `count` bytes; raises ValueError at the end."""
        self._at += count
        if self._at > len(self._data):
            raise ValueError("the data end")
        return int.from_bytes(self._data[self._at - count : self._at])


class _Bits:
    """Reads numbers of so many bits, one after another."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data)
        # Mutable state: the bits that are left.
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        """The next number of `count` bits; raises ValueError at the end."""
        self._left -= count
        if self._left < 0:
            raise ValueError("the header ends")
        return self._value >> self._left & (1 << count) - 1
