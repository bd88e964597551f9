"""What of a WebP file counts, of its chunks (https://developers.google.com/speed/webp/docs/riff_container)."""

import struct

_EXTENDED, _ANIMATION = b"VP8X", 2
_MOST_CHUNKS = 2**16
_HEAD = 8  # bytes of a chunk's name and length


def is_animated(raw: bytes) -> bool:
    """Whether it has frames, which may be smaller than the canvas."""
    return raw[12:16] == _EXTENDED and bool(raw[20] & _ANIMATION)


def without_cut_chunk(raw: bytes) -> bytes:
    """The file without a last chunk that is cut, such as metadata or another frame: libwebp reads only whole files."""
    if raw[12:16] != _EXTENDED or len(raw) >= _HEAD + int.from_bytes(raw[4:8], "little"):
        return raw
    end = 12
    for _ in range(_MOST_CHUNKS):
        size = int.from_bytes(raw[end + 4 : end + 8], "little")
        following = end + _HEAD + size + size % 2
        if end + _HEAD > len(raw) or following > len(raw):
            break
        end = following
    return raw[:4] + struct.pack("<I", end - _HEAD) + raw[8:end]
