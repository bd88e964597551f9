"""Embeddings in one `.npz`: an array for each column, written and read without having all of it in memory."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy

from cli.blocks import COLUMNS, Block, Column
from cli.made import BrokenTable, Made

_MADE = "made"
_ROWS = 4096


def require() -> None:
    """Nothing: numpy is always there."""


def write(path: Path, blocks: Callable[[], Iterable[Block]], made: Made) -> None:
    """Write what `blocks` gives, which is gone through once for sizes and once for each column."""
    count, types, shape = 0, dict.fromkeys(COLUMNS, np.dtype("<U1")), (0,)
    for block in blocks():
        count += len(block)
        shape = block.embedding.shape[1:]
        types = {name: np.promote_types(types[name], column.dtype) if column.dtype.kind == "U" else column.dtype
                 for name, column in block.columns().items()}  # fmt: skip
    with ZipFile(path, "w", allowZip64=True) as archive:
        for name in COLUMNS:
            of_row = shape if name == "embedding" else ()
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                described = npy.descr_to_dtype, npy.dtype_to_descr(types[name])
                npy.write_array_header_1_0(
                    file, {"descr": described[1], "fortran_order": False, "shape": (count, *of_row)}
                )
                for block in blocks():
                    file.write(np.ascontiguousarray(block.columns()[name], types[name]).tobytes())
        with archive.open(f"{_MADE}.npy", "w") as file:
            npy.write_array(file, np.array(json.dumps(made.fields())), allow_pickle=False)


def read(path: Path) -> Iterator[Block]:
    """The rows of `path`, some at a time.

    Raises:
        BrokenTable: it is none that `write` made.
    """
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(ZipFile(path))
            columns = {name: _Reader(stack.enter_context(archive.open(f"{name}.npy"))) for name in COLUMNS}
            left = columns["path"].shape[0]
            while left:
                rows = min(left, _ROWS)
                left -= rows
                yield Block(**{name: column.read(rows) for name, column in columns.items()})
    except (BadZipFile, KeyError, ValueError, EOFError) as error:
        raise BrokenTable(f"{path} is no table of embeddings: {error}") from error


def made_of(path: Path) -> Made:
    """How the embeddings in `path` were made; raises BrokenTable."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return Made(**json.loads(str(file[_MADE])))
    except (BadZipFile, KeyError, ValueError, TypeError, EOFError) as error:
        raise BrokenTable(f"{path} is no table of embeddings: {error}") from error


class _Reader:
    """An array in an open `.npy`, taken from its beginning."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401  zipfile's, which is BinaryIO in all but name
        self._file: BinaryIO = file
        if npy.read_magic(self._file) != (1, 0):
            raise ValueError("an array of another version")
        self.shape, _, self._type = npy.read_array_header_1_0(self._file)

    def read(self, rows: int) -> Column:
        """The next `rows`."""
        shape = (rows, *self.shape[1:])
        size = int(np.prod(shape)) * self._type.itemsize
        data = self._file.read(size)
        if len(data) != size:
            raise EOFError("it ends too early")
        return np.frombuffer(data, self._type).reshape(shape)
