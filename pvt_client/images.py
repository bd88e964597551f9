"""Images, from the forms in which callers hold them to the bytes that are sent."""

import os
import struct
import zlib
from collections.abc import Mapping
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


@runtime_checkable
class Tensor(Protocol):
    """The part of `torch.Tensor` that is used, so that torch need not be installed."""

    def detach(self) -> Any:  # noqa: ANN401  torch's own
        """The same without its history."""

    def is_floating_point(self) -> bool:
        """Whether it holds floats."""


Image: TypeAlias = str | os.PathLike[str] | bytes | BinaryFile | PilImage | NDArray[Any] | Tensor
"""An image: a path, encoded bytes, an open file, a PIL image, pixels (H, W) or (H, W, 1 | 3 | 4), or a torch tensor
(H, W) or (1 | 3 | 4, H, W). Pixels are `uint8`, `uint16` or floats from 0 to 1."""

# Not a Sequence: text and bytes are sequences too.
AnyImage = TypeVar("AnyImage", bound=Image)
Images: TypeAlias = list[AnyImage] | tuple[AnyImage, ...]

# Modes that PNG holds as they are, those that only TIFF does, and those with alpha; others are converted to RGB.
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
_TIFF_MODES = {"I", "F", "I;16B", "LAB"}
_ALPHA_MODES = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
_ORIENTATION, _UPRIGHT = 0x0112, 1
# An EXIF block of nothing but the orientation, whose number follows: where a camera was is nobody's business.
_EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0"
_DTYPES = {np.dtype(np.uint8), np.dtype(np.uint16)}  # of a PNG's values
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
            return _of_path(image)
        case np.ndarray():
            return encode_png(image)
        case PilImage():
            return _of_pil(image)
        case Tensor():
            return encode_png(_of_tensor(image))
        case BinaryFile():
            return image.read()
    message = "pass a path, bytes, a file opened with 'rb', a PIL image, an array or a tensor"
    raise ImageUnreadable(f"{type(image).__name__} is not an image: {message}")


def _of_path(path: str | os.PathLike[str]) -> bytes:
    if isinstance(path, str) and path.lower().startswith(("http://", "https://", "s3://", "gs://")):
        raise ImageUnreadable("that is a URL; fetch it and pass its bytes, or POST it to the service as JSON")
    if (file := Path(path)).is_dir():
        raise ImageUnreadable("that is a folder; pass the files in it, as predict_many(sorted(Path(folder).iterdir()))")
    return file.read_bytes()


def _of_pil(image: PilImage) -> bytes:
    """The current frame, with the values and the orientation that its file has: the service gives the same answer."""
    getattr(image, "load", lambda: None)()  # which turns a TIFF, and then its orientation is gone
    exif: Mapping[int, Any] = getattr(image, "getexif", dict)()
    buffer, options = BytesIO(), dict[str, Any]()
    if image.mode in _TIFF_MODES:
        image.save(buffer, "TIFF")
        return buffer.getvalue()
    if (orientation := exif.get(_ORIENTATION, _UPRIGHT)) in range(2, 9):
        options["exif"] = _EXIF + bytes((orientation,)) + bytes(6)
    image = image if image.mode in _PNG_MODES else image.convert(_ALPHA_MODES.get(image.mode, "RGB"))
    image.save(buffer, "PNG", compress_level=_FAST, **options)
    return buffer.getvalue()


def _of_tensor(tensor: Any) -> NDArray[Any]:  # noqa: ANN401  torch's own
    """The pixels of a torch tensor (C, H, W) or (H, W), channels last."""
    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if array.ndim == 3 and array.shape[0] in _COLOUR_TYPES:  # noqa: PLR2004
        return array.transpose(1, 2, 0)
    if array.ndim == 2:  # noqa: PLR2004
        return array
    advice = "; pass its images one by one, as a list" if array.ndim == 4 else ""  # noqa: PLR2004
    raise ImageUnreadable(
        f"a tensor of shape {array.shape} is not an image: (H, W) or (1 | 3 | 4, H, W) is expected{advice}"
    )


def _whole_numbers(pixels: NDArray[Any]) -> NDArray[Any]:
    """Floats from 0 to 1 as `uint8`; other types as they are."""
    if pixels.dtype.kind != "f" or not pixels.size:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= 1:
        raise ImageUnreadable(
            f"an array of {pixels.dtype} from {low:g} to {high:g} is not an image: floats must be from 0 to 1; undo a "
            "normalisation, or convert values up to 255 to uint8"
        )
    scaled: NDArray[Any] = np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    return scaled


def encode_png(pixels: NDArray[Any]) -> bytes:
    """Pixels (H, W) or (H, W, 1 | 3 | 4) as a PNG: `uint8` and `uint16` as they are, floats from 0 to 1 in 8 bits.

    Raises:
        ImageUnreadable: another dtype or shape, or floats beyond.
    """
    planes = pixels[:, :, None] if pixels.ndim == 2 else pixels  # noqa: PLR2004
    expected = planes.ndim == 3 and planes.shape[2] in _COLOUR_TYPES and bool(planes.size)  # noqa: PLR2004
    planes = _whole_numbers(planes) if expected else planes
    if not expected or planes.dtype.newbyteorder("=") not in _DTYPES:
        raise ImageUnreadable(
            f"an array of {pixels.dtype} {pixels.shape} is not an image: uint8 (H, W) or (H, W, 1 | 3 | 4) is expected,"
            f" one array for each image, or uint16, or floats from 0 to 1{_advice(pixels)}"
        )
    height, width, channels = planes.shape
    values = planes.astype(planes.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    rows = np.zeros((height, 1 + values.shape[1]), np.uint8)  # each row begins with its filter's number: 0, none
    rows[:, 1:] = values
    header = struct.pack(">IIBBBBB", width, height, 8 * planes.itemsize, _COLOUR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), _FAST)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _advice(pixels: NDArray[Any]) -> str:
    if pixels.ndim == 4:  # noqa: PLR2004
        return "; pass a batch as list(array), or to predict_many"
    if pixels.ndim == 3 and pixels.shape[0] in _COLOUR_TYPES:  # noqa: PLR2004
        return "; where channels come first, pass array.transpose(1, 2, 0)"
    return ""


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
