"""Arrays as bytes: NumPy's two formats, safetensors, and numbers for JSON."""

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import orjson
import safetensors.numpy
from numpy.typing import NDArray

from service.errors import InvalidRequest

Arrays = Mapping[str, NDArray[Any]]
NPY, NPZ, SAFETENSORS = "application/x-npy", "application/x-npz", "application/vnd.safetensors"
# orjson holds the interpreter's lock for a whole call, with numbers for a millisecond in 20,000: other threads, the
# event loop's too, get their turn between two.
_AT_ONCE = 20_000


def encode(arrays: Arrays, media_type: str, metadata: Mapping[str, str]) -> bytes:
    """`arrays` in one of the binary forms; `metadata` goes with them where the form has a place for it.

    Raises:
        InvalidRequest: .npy holds one array and there are others.
    """
    return _ENCODERS[media_type](arrays, metadata)


def json_array(array: NDArray[Any]) -> orjson.Fragment:
    """`array` as JSON lists, nested as its axes are, for orjson to put in its place. Large ones must be flat."""
    if array.ndim > 1:
        return orjson.Fragment(_json(array))
    parts = [_json(array[start : start + _AT_ONCE])[1:-1] for start in range(0, len(array), _AT_ONCE)]
    return orjson.Fragment(b"[" + b",".join(parts) + b"]")


def little_endian(array: NDArray[np.float32]) -> bytes:
    """Its numbers as float32, whatever this machine's order of bytes."""
    return array.astype("<f4", copy=False).tobytes()


def _json(array: NDArray[Any]) -> bytes:
    return orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY)


def _npy(arrays: Arrays, _: Mapping[str, str]) -> bytes:
    if len(arrays) != 1:
        raise InvalidRequest(
            f"{NPY} holds one array, and {', '.join(arrays)} were asked for; ask for {NPZ} or {SAFETENSORS}, or for "
            "one of them (embedding=false leaves the embedding out)"
        )
    buffer = BytesIO()
    np.save(buffer, next(iter(arrays.values())), allow_pickle=False)
    return buffer.getvalue()


def _npz(arrays: Arrays, _: Mapping[str, str]) -> bytes:
    buffer = BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _safetensors(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    return safetensors.numpy.save({name: np.ascontiguousarray(each) for name, each in arrays.items()}, dict(metadata))


_ENCODERS: Mapping[str, Callable[[Arrays, Mapping[str, str]], bytes]] = {
    NPY: _npy,
    NPZ: _npz,
    SAFETENSORS: _safetensors,
}
