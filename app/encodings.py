"""Arrays as bytes: NumPy's two formats, safetensors, and JSON. All in pieces, so that no answer is in memory whole."""

import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO, RawIOBase
from math import prod
from time import sleep
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import InvalidRequest

NPY, NPZ, SAFETENSORS = "application/x-npy", "application/x-npz", "application/vnd.safetensors"
# orjson holds the interpreter's lock for a whole call, with numbers for a millisecond in 20,000. Between two calls the
# lock is offered: otherwise it is given up only every five milliseconds, and a turn of the event loop needs it often.
_AT_ONCE = 20_000
CHUNK_BYTES = 500_000  # of an answer that is sent as it is made; for each there are one or two in memory
_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class Stack:
    """An array whose first axis is the image, made of one array of `shape` for each when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    arrays: Iterable[NDArray[Any]]
    count: int

    @classmethod
    def of(cls, count: int, make: Callable[[int], NDArray[Any]]) -> "Stack":
        """Of `count` arrays, at least one, that `make` makes; all are as the first."""
        first = make(0)
        return cls(first.shape, first.dtype, map(make, range(count)), count)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """With the first axis."""
        return (self.count, *self.shape)

    @property
    def nbytes(self) -> int:
        """Of all images."""
        return prod(self.whole_shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[bytes]:
        """Its numbers, little-endian, in C order."""
        for each in self.arrays:
            yield from array_pieces(np.ascontiguousarray(each, self.dtype.newbyteorder("<")))


Stacks = Mapping[str, Stack]


def check_holds(media_type: str, names: Collection[str]) -> None:
    """Raises InvalidRequest where `media_type` is .npy, which holds one array, and `names` are several."""
    if media_type == NPY and len(names) != 1:
        raise InvalidRequest(
            f"{NPY} holds one array, and {', '.join(names)} were requested; accept {NPZ} or {SAFETENSORS}, or request "
            "one of them (embedding=false leaves the embedding out)"
        )


def encode(stacks: Stacks, media_type: str, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """`stacks` in one of the binary forms, with `metadata` where the form has a place for it.

    Raises:
        InvalidRequest: as `check_holds`, before the first piece.
    """
    check_holds(media_type, stacks)
    if media_type == SAFETENSORS:
        return _safetensors(stacks, metadata)
    return _npy(next(iter(stacks.values()))) if media_type == NPY else _npz(stacks)


def array_pieces(array: NDArray[Any]) -> Iterator[bytes]:
    """The bytes of an array that is contiguous."""
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES].tobytes()


def _npy(stack: Stack) -> Iterator[bytes]:
    header = BytesIO()
    descr = np.lib.format.dtype_to_descr(stack.dtype.newbyteorder("<"))
    fields = {"descr": descr, "fortran_order": False, "shape": stack.whole_shape}
    np.lib.format.write_array_header_1_0(header, fields)
    yield header.getvalue()
    yield from stack.pieces()


def _npz(stacks: Stacks) -> Iterator[bytes]:
    out = _Written()
    with zipfile.ZipFile(out, "w") as archive:
        for name, stack in stacks.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(entry, "w", force_zip64=True) as file:
                for piece in _npy(stack):
                    file.write(piece)
                    yield out.take()
    yield out.take()


class _Written(RawIOBase):
    """What was written since the last `take`; it can't be sought in, so an archive has its sizes after its data."""

    def __init__(self) -> None:
        super().__init__()
        # Mutable state: the pieces.
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # noqa: ANN401  a buffer
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def _safetensors(stacks: Stacks, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """See https://huggingface.co/docs/safetensors: the length of a JSON header, the header, the tensors one by one."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, stack in stacks.items():
        start, end = end, end + stack.nbytes
        kind = _SAFETENSORS_TYPES[stack.dtype.name]
        entries[name] = {"dtype": kind, "shape": stack.whole_shape, "data_offsets": (start, end)}
    header = orjson.dumps(entries)
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for stack in stacks.values():
        yield from stack.pieces()


def json_bytes(value: object) -> bytes:
    """`value` as JSON; arrays in it, which must be contiguous, become lists, nested as their axes are."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_pieces(value: object) -> Iterator[bytes]:
    """The same in pieces: dicts, lists, iterators, which become lists, and large flat arrays.

    What an iterator yields is made when its turn comes. A Stack becomes a flat list.
    """
    if isinstance(value, dict):
        for i, (key, each) in enumerate(value.items()):
            yield (b"," if i else b"{") + orjson.dumps(key) + b":"
            yield from json_pieces(each)
        yield b"}" if value else b"{}"
    elif isinstance(value, list | Iterator):
        yield b"["
        for i, each in enumerate(value):
            if i:
                yield b","
            yield from json_pieces(each)
        yield b"]"
    elif isinstance(value, Stack):
        yield b"["
        for i, each in enumerate(value.arrays):
            if i:
                yield b","
            yield from _numbers(np.ascontiguousarray(each, value.dtype).ravel())
        yield b"]"
    elif isinstance(value, np.ndarray) and value.ndim == 1 and value.size > _AT_ONCE:
        yield b"["
        yield from _numbers(value)
        yield b"]"
    else:
        yield json_bytes(value)


def json_array(array: NDArray[Any]) -> orjson.Fragment:
    """A flat array as a JSON list, for orjson to put in its place."""
    return orjson.Fragment(b"".join((b"[", *_numbers(array), b"]")))


def chunks(pieces: Iterable[bytes], size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """`pieces`, joined to chunks of at least `size` bytes but the last."""
    waiting: list[bytes] = []
    length = 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length >= size:
            yield b"".join(waiting)
            waiting, length = [], 0
    if waiting:
        yield b"".join(waiting)


def _numbers(array: NDArray[Any]) -> Iterator[bytes]:
    """The items of a JSON list of a flat array's numbers."""
    for start in range(0, array.size, _AT_ONCE):
        if start:
            sleep(0)
            yield b","
        yield json_bytes(array[start : start + _AT_ONCE])[1:-1]


def little_endian(array: NDArray[np.float32]) -> bytes:
    """Its numbers as float32, whatever this machine's order of bytes."""
    return array.astype("<f4", copy=False).tobytes()
