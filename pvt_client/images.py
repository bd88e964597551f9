"""Images, from the forms in which callers hold them to the bytes that are sent."""

import base64
import binascii
import inspect
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from pvt_client.errors import ImageUnreadable
from pvt_client.pixels import COLOUR_TYPES, UPRIGHT, encode_png, encode_tiff


@runtime_checkable
class BinaryFile(Protocol):
    """What `open(path, "rb")` returns."""

    def read(self) -> bytes:
        """All that is left, as bytes."""


@runtime_checkable
class PilImage(Protocol):
    """The part of `PIL.Image.Image` that is used, so that Pillow need not be installed."""

    info: Any

    @property
    def mode(self) -> str:
        """How a pixel is stored."""

    def convert(self, mode: str) -> Any:  # noqa: ANN401  Pillow's own
        """The image in another mode."""

    def copy(self) -> Any:  # noqa: ANN401  Pillow's own
        """The same pixels, apart from the file."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002, ANN401  Pillow's own
        """Write it into `fp`."""


@runtime_checkable
class Tensor(Protocol):
    """The part of `torch.Tensor` that is used, so that torch need not be installed."""

    def detach(self) -> Any:  # noqa: ANN401  torch's own
        """The same without its history."""

    def is_floating_point(self) -> bool:
        """Whether it holds floats."""


@runtime_checkable
class ArrayLike(Protocol):
    """An array of another library: JAX, TensorFlow, pandas."""

    def __array__(self) -> NDArray[Any]:
        """The same as numpy's."""


Image: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | PilImage | NDArray[Any] | Tensor | ArrayLike
)
"""An image: a path, a data: URL, encoded bytes, an open file, a PIL image, pixels (H, W) or (H, W, 1 | 3 | 4), or a
torch tensor (H, W) or (1 | 3 | 4, H, W). Pixels are `uint8`, `uint16`, `bool` or floats from 0 to 1, in RGB."""

# Not a Sequence: text and bytes are sequences too.
AnyImage = TypeVar("AnyImage", bound=Image)
Images: TypeAlias = list[AnyImage] | tuple[AnyImage, ...]

# Modes that PNG holds as they are, and those with alpha; others are converted to RGB.
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
_ALPHA_MODES = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
_ORIENTATION, _PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 0x0112, 262, 258, 339
_SHORT = 3  # the type of an orientation
# Samples of a TIFF that Pillow holds as another type: sample format and bits, and their type.
_STORED: Mapping[tuple[int, int], np.dtype[Any]] = {(2, 8): np.dtype(np.int8), (1, 32): np.dtype(np.uint32)}
# An EXIF block of nothing but the orientation, whose number follows: where a camera was is nobody's business.
_EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0"
_FAST = 1  # zlib level
_PLANE, _IMAGE, _BATCH = 2, 3, 4  # axes
_SHOWN = 100  # characters of text that is no path
_LONGEST_NAME = 255
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]+://")
_DATA_URL = re.compile(r"(?i)data:[^,]*,")
_ONE = "pass a path, bytes, a file opened with 'rb', a PIL image, an array or a tensor"


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
    path = image if isinstance(image, str | os.PathLike) else None
    is_data = isinstance(path, str) and _DATA_URL.match(path)
    named = path or getattr(image, "name", None) or getattr(image, "filename", None)
    name = Path(named).name if isinstance(named, str | os.PathLike) and not is_data else None
    kind = "the PIL image" if isinstance(image, PilImage) else "the tensor" if isinstance(image, Tensor) else "the file"
    label = name or kind
    if path is not None:
        label = "the data URL" if is_data else _shortened(str(path))
    try:
        data: object = _encoded(image)
    except ImageUnreadable as error:
        raise error if not path else ImageUnreadable(f"{label}: {error}") from error.__cause__
    except Exception as error:  # whatever a decoder or another library raises: it is of this image
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageUnreadable(f"{label}: {reason}{_encoded_advice(path)}") from error
    if inspect.iscoroutine(data):
        data.close()
        raise ImageUnreadable(f"{label} is read asynchronously; pass what `await file.read()` returns")
    if not isinstance(data, bytes):
        raise ImageUnreadable(f"{label} returns {type(data).__name__}; open it with 'rb'")
    if not data and _is_at_end(image):
        raise ImageUnreadable(f"{label} was read to its end before; seek(0), or pass its bytes")
    return Upload(name or None, data)


def batch(images: object) -> list[Any] | None:
    """The images of a list, or of an array or tensor of four axes; None for a single image."""
    if isinstance(images, list | tuple):
        return [*images]
    if not _is_array_like(images) or getattr(images, "ndim", 0) != _BATCH:
        return None
    array: Any = images if isinstance(images, Tensor) else np.asarray(images)
    return [*array]


def check_iterable(images: object) -> None:
    """Raises ImageUnreadable, with what to pass, for one image, or anything else, in place of several images."""
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | PilImage | BinaryFile):
        folder = "" if not isinstance(images, str | os.PathLike) else "; of a folder sorted(Path(folder).iterdir())"
        raise ImageUnreadable(f"{type(images).__name__} is one image and several are expected: pass a list{folder}")
    if hasattr(images, "columns"):
        raise ImageUnreadable(f"{type(images).__name__} is a table; pass its column of paths")
    axes, shape = getattr(images, "ndim", 0), getattr(images, "shape", ())
    if axes == _PLANE or (axes == _IMAGE and shape[0 if isinstance(images, Tensor) else -1] in COLOUR_TYPES):
        raise ImageUnreadable(f"{type(images).__name__} is one image and several are expected: pass a list")
    if not hasattr(images, "__iter__") and not hasattr(images, "__aiter__"):
        raise ImageUnreadable(f"{type(images).__name__} holds no images: pass a list, or whatever yields images")


def _encoded(image: Image) -> bytes:
    match image:
        case str() | os.PathLike():
            return _of_path(image)
        case bytearray() | memoryview():
            return bytes(image)
        case PilImage() if not isinstance(image, np.ndarray):
            return _of_pil(image)
        case BinaryFile():
            return image.read()
    if _is_array_like(image):
        return encode_png(_of_tensor(image) if isinstance(image, Tensor) else np.asanyarray(image))
    if isinstance(image, list | tuple):
        raise ImageUnreadable("a list in a list is not one image: pass one list, and pixels as numpy.array(numbers)")
    if isinstance(image, Iterable):
        raise ImageUnreadable(f"{type(image).__name__} is not one image: pass a list, or pass it to predict_many")
    raise ImageUnreadable(f"{type(image).__name__} is not an image: {_ONE}")


def _is_array_like(image: object) -> bool:
    return isinstance(image, ArrayLike) and not isinstance(image, type)


def _is_at_end(image: object) -> bool:
    tell: Callable[[], int] = getattr(image, "tell", lambda: 0)
    with suppress(Exception):  # of a stream that can't tell
        return bool(isinstance(image, BinaryFile) and tell())
    return False


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _encoded_advice(path: object) -> str:
    if isinstance(path, str) and len(path) > _LONGEST_NAME:
        return "; if that is an image in base64, pass base64.b64decode(text)"
    return ""


def _of_path(path: str | os.PathLike[str]) -> bytes:
    if isinstance(path, str):
        if not path:
            raise ImageUnreadable("an empty path is no file; pass the path of one")
        if match := _DATA_URL.match(path):
            return _of_data_url(match[0], path[match.end() :])
        if match := _URL.match(path):
            advice = {"file://": "pass its path"}.get(match[0].lower(), "fetch it and pass its bytes")
            raise ImageUnreadable(f"that is a URL; {advice}, or POST it to the service as JSON")
    if (file := Path(path)).is_dir():
        raise ImageUnreadable("that is a folder; pass the files in it, as predict_many(sorted(Path(folder).iterdir()))")
    return file.read_bytes()


def _of_data_url(head: str, data: str) -> bytes:
    """The bytes of a `data:` URL (RFC 2397), in base64 of either alphabet, with line breaks, and padded or not."""
    if not re.search(r"(?i);\s*base64\s*,$", head):
        raise ImageUnreadable("that is a data URL without base64; pass the bytes that it encodes")
    compact = re.sub(r"\s", "", unquote(data)).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageUnreadable(f"its base64 is not valid: {error}") from error


def _of_pil(image: PilImage) -> bytes:
    """The current frame, with the values and the orientation that its file has: the service gives the same answer."""
    getattr(image, "load", lambda: None)()  # which turns a TIFF, and reads what a PNG has behind its pixels
    orientation = _orientation(image.info.get("exif"))
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    kind = tags.get(_SAMPLE_FORMAT, (1,))[0], tags.get(_BITS, (0,))[0]
    if kind in _STORED or image.mode in {"I", "F"} or (image.mode[:2] == "I;" and (tags or image.mode != "I;16")):
        return _of_numbers(image, kind, orientation, white_is_zero=tags.get(_PHOTOMETRIC) == 0)
    buffer, bare = BytesIO(), image.copy()
    bare.info = {name: value for name, value in image.info.items() if name == "transparency"}
    if image.mode == "LAB":
        bare.save(buffer, "TIFF", tiffinfo={_ORIENTATION: orientation})
        return buffer.getvalue()
    if image.mode not in _PNG_MODES:
        bare = bare.convert(_ALPHA_MODES.get(image.mode, "RGB"))
    exif = {} if orientation == UPRIGHT else {"exif": _EXIF + bytes((orientation,)) + bytes(6)}
    bare.save(buffer, "PNG", compress_level=_FAST, **exif)
    return buffer.getvalue()


def _of_numbers(image: PilImage, kind: tuple[int, int], orientation: int, *, white_is_zero: bool) -> bytes:
    """A grey image of more than 8 bits, or of signed numbers, with the meaning that its TIFF gives them, if it has one.

    `kind` is the sample format and the bits.
    """
    values: NDArray[Any] = np.asarray(image)
    if kind in _STORED:
        values = values.view(_STORED[kind])
    if image.mode[:2] == "I;" and 0 < kind[1] < 16:  # noqa: PLR2004  of 12 bits, whose white is another
        values = np.rint(values * (65_535 / (2 ** kind[1] - 1))).astype(np.uint16)
    return encode_tiff(values, orientation=orientation, white_is_zero=white_is_zero)


def _orientation(exif: object) -> int:
    """1 to 8, from an EXIF block as the service reads it: only the first directory, and nothing from XMP."""
    if not isinstance(exif, bytes):
        return UPRIGHT
    tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order = "<" if tiff[:2] == b"II" else ">"
    with suppress(struct.error):  # a broken block is none
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for number in range(count):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * number)
            if (tag, kind, values) == (_ORIENTATION, _SHORT, 1):
                return value if value in range(1, 9) else UPRIGHT
    return UPRIGHT


def _of_tensor(tensor: Any) -> NDArray[Any]:  # noqa: ANN401  torch's own
    """The pixels of a torch tensor (C, H, W) or (H, W), channels last."""
    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if array.ndim == _IMAGE and array.shape[0] in COLOUR_TYPES:
        return array.transpose(1, 2, 0)
    if array.ndim == _PLANE:
        return array
    advice = "; pass its images one by one, as a list" if array.ndim == _BATCH else ""
    if array.ndim == _IMAGE and array.shape[2] in COLOUR_TYPES:
        advice = "; where channels come last, pass tensor.numpy()"
    raise ImageUnreadable(
        f"a tensor of shape {array.shape} is not an image: (H, W) or (1 | 3 | 4, H, W) is expected{advice}"
    )
