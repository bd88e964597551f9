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
    if isinstance(image, str | os.PathLike):
        return _from_path(Path(image))
    if isinstance(image, np.ndarray):
        return Upload(None, encode_png(image))
    if isinstance(image, PilImage):
        return Upload(_name_of(image), _from_pil(image))
    if isinstance(image, BinaryFile):
        return _from_file(image)
    raise ImageUnreadable(
        f"{type(image).__name__} is not an image: pass a path, bytes, a file opened with 'rb', a PIL image or an array"
    )


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


def _from_path(path: Path) -> Upload:
    try:
        return Upload(path.name, path.read_bytes())
    except (OSError, ValueError) as error:  # a name with a zero byte
        raise ImageUnreadable(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _from_file(file: BinaryFile) -> Upload:
    name = _name_of(file)
    try:
        data = file.read()
    except (OSError, ValueError) as error:  # closed, or text that is not UTF-8
        raise ImageUnreadable(f"{name or 'the file'}: {error}") from error
    if not isinstance(data, bytes):
        raise ImageUnreadable(f"{name or 'the file'} returns {type(data).__name__}; open it with 'rb'")
    return Upload(name, data)


def _from_pil(image: PilImage) -> bytes:
    buffer = BytesIO()
    try:
        (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=_FAST)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reads lazily: the file may be broken
        raise ImageUnreadable(f"{_name_of(image) or 'the PIL image'}: {error}") from error
    return buffer.getvalue()


def _name_of(holder: object) -> str | None:
    """The last part of the file name that files and PIL images carry."""
    name = getattr(holder, "name", None) or getattr(holder, "filename", None)
    return Path(name).name if isinstance(name, str) and name else None
