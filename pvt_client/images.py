"""Images, from the forms in which callers hold them to the bytes that are sent."""

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pvt_client.errors import ImageUnreadable


@runtime_checkable
class BinaryFile(Protocol):
    """What `open(path, "rb")` returns."""

    def read(self) -> bytes:
        """All that is left, as bytes."""


@runtime_checkable
class PilImage(Protocol):
    """The part of `PIL.Image.Image` that is used, so that Pillow need not be installed."""

    @property
    def mode(self) -> str:
        """How a pixel is stored."""

    def convert(self, mode: str) -> Any:  # noqa: ANN401  Pillow's own
        """The image in another mode."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002, ANN401  Pillow's own
        """Write it into `fp`."""


Image: TypeAlias = str | os.PathLike[str] | bytes | BinaryFile | PilImage | NDArray[np.uint8]
"""An image: a path, encoded bytes, an open file, a PIL image, or `uint8` pixels (H, W) or (H, W, 1 | 3 | 4)."""

# Not a Sequence: text and bytes are sequences too.
AnyImage = TypeVar("AnyImage", bound=Image)
Images: TypeAlias = list[AnyImage] | tuple[AnyImage, ...]

# Modes that PNG holds as they are; others are converted.
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # PNG's number for grey, RGB and RGBA
_FAST = 1  # zlib level: each of these images is sent once


class Upload(NamedTuple):
    """An encoded image and its file name, None if it has none."""

    filename: str | None
    data: bytes


def upload(image: Image) -> Upload:
    """`image` encoded; reads the file if it is one.

    Raises:
        ImageUnreadable: there is no such file, or this can't be sent; the message says which.
    """
    if isinstance(image, bytes):
        return Upload(None, image)
    path = Path(image) if isinstance(image, str | os.PathLike) else None
    named = path or getattr(image, "name", None) or getattr(image, "filename", None)
    name = Path(named).name if isinstance(named, str | os.PathLike) else None
    label = path or name or ("the PIL image" if isinstance(image, PilImage) else "the file")
    try:
        data: object = _encoded(image)
    except (OSError, ValueError, SyntaxError) as error:  # also a closed file, a name with a zero byte, a broken image
        raise ImageUnreadable(f"{label}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(data, bytes):
        raise ImageUnreadable(f"{label} returns {type(data).__name__}; open it with 'rb'")
    return Upload(name or None, data)


def _encoded(image: Image) -> bytes:
    match image:
        case str() | os.PathLike():
            return Path(image).read_bytes()
        case np.ndarray():
            return encode_png(image)
        case PilImage():
            buffer = BytesIO()
            (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=_FAST)
            return buffer.getvalue()
        case BinaryFile():
            return image.read()
    message = "pass a path, bytes, a file opened with 'rb', a PIL image or an array"
    raise ImageUnreadable(f"{type(image).__name__} is not an image: {message}")


def encode_png(pixels: NDArray[Any]) -> bytes:
    """`uint8` pixels (H, W) or (H, W, 1 | 3 | 4) as a PNG, lossless.

    Raises:
        ImageUnreadable: another dtype or shape.
    """
    planes = pixels[:, :, None] if pixels.ndim == 2 else pixels  # noqa: PLR2004
    if planes.dtype != np.uint8 or planes.ndim != 3 or planes.shape[2] not in _COLOUR_TYPES or not planes.size:  # noqa: PLR2004
        raise ImageUnreadable(
            f"an array of {pixels.dtype} {pixels.shape} is not an image: "
            "uint8 (H, W) or (H, W, 1 | 3 | 4) is expected, one array for each image"
        )
    height, width, channels = planes.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each row begins with its filter's number: 0, none
    rows[:, 1:] = planes.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), _FAST)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
