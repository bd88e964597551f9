"""Arrays as bytes: NumPy's two formats, safetensors, and JSON."""

from collections.abc import Collection, Iterator, Mapping
from io import BytesIO
from time import sleep
from typing import Any

import numpy as np
import orjson
import safetensors.numpy
from numpy.typing import NDArray

from service.errors import InvalidRequest

Arrays = Mapping[str, NDArray[Any]]
NPY, NPZ, SAFETENSORS = "application/x-npy", "application/x-npz", "application/vnd.safetensors"
# orjson holds the interpreter's lock for a whole call, with numbers for a millisecond in 20,000. Between two calls the
# lock is offered: otherwise it is given up only every five milliseconds, and a turn of the event loop needs it often.
_AT_ONCE = 20_000
_CHUNK_BYTES = 1_000_000


def check_holds(media_type: str, names: Collection[str]) -> None:
    """Raises InvalidRequest where `media_type` is .npy, which holds one array, and `names` are several."""
    if media_type == NPY and len(names) != 1:
        raise InvalidRequest(
            f"{NPY} holds one array, and {', '.join(names)} were requested; accept {NPZ} or {SAFETENSORS}, or request "
            "one of them (embedding=false leaves the embedding out)"
        )


def encode(arrays: Arrays, media_type: str, metadata: Mapping[str, str]) -> bytes:
    """`arrays` in one of the binary forms, with `metadata` where the form has a place for it.

    Raises:
        InvalidRequest: as `check_holds`.
    """
    check_holds(media_type, arrays)
    if media_type == SAFETENSORS:
        contiguous = {name: np.ascontiguousarray(each) for name, each in arrays.items()}
        return safetensors.numpy.save(contiguous, dict(metadata))
    buffer = BytesIO()
    if media_type == NPY:
        np.save(buffer, next(iter(arrays.values())), allow_pickle=False)
    else:
        np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def json_bytes(value: object) -> bytes:
    """`value` as JSON; arrays in it, which must be contiguous, become lists, nested as their axes are."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_array(array: NDArray[Any]) -> orjson.Fragment:
    """`array` as JSON lists, nested as its axes are, for orjson to put in its place. Large ones must be flat."""
    if array.ndim > 1:
        return orjson.Fragment(json_bytes(np.ascontiguousarray(array)))
    return orjson.Fragment(b"".join(_numbers(np.ascontiguousarray(array))))


def json_chunks(value: object) -> list[bytes]:
    """The same in chunks of about a megabyte, for a thread beside the event loop: dicts, lists, large flat arrays."""
    chunks: list[bytes] = []
    waiting: list[bytes] = []
    size = 0
    for part in _parts(value):
        waiting.append(part)
        size += len(part)
        if size >= _CHUNK_BYTES:
            chunks.append(b"".join(waiting))
            waiting, size = [], 0
    return [*chunks, b"".join(waiting)]


def _parts(value: object) -> Iterator[bytes]:
    if isinstance(value, dict):
        for i, (key, each) in enumerate(value.items()):
            yield (b"," if i else b"{") + orjson.dumps(key) + b":"
            yield from _parts(each)
        yield b"}" if value else b"{}"
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield b"," if i else b"["
            yield from _parts(each)
        yield b"]" if value else b"[]"
    elif isinstance(value, np.ndarray) and value.ndim == 1 and value.size > _AT_ONCE:
        yield from _numbers(value)
    else:
        yield json_bytes(value)


def _numbers(array: NDArray[Any]) -> Iterator[bytes]:
    """A flat array as a JSON list."""
    yield b"["
    for start in range(0, array.size, _AT_ONCE):
        if start:
            sleep(0)
            yield b","
        yield json_bytes(array[start : start + _AT_ONCE])[1:-1]
    yield b"]"


def little_endian(array: NDArray[np.float32]) -> bytes:
    """Its numbers as float32, whatever this machine's order of bytes."""
    return array.astype("<f4", copy=False).tobytes()
