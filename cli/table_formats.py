"""Tables of embeddings as files: `.npz`, an array for each column, and `.parquet`, a row group for each group of rows.

Both are written and read without having all of the table in memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy

from cli.rows import COLUMNS, Column, Provenance, Rows
from cli.terminal import USAGE, CommandError

_NPZ_PROVENANCE, _PARQUET_PROVENANCE = "made", b"pvt-serve"
_ROWS = 4096  # read at a time


class BrokenTable(Exception):
    """A file that is not a table of embeddings; the message says why."""


@dataclass(frozen=True, slots=True)
class TableFormat:
    """How a table is written and read.

    `write` calls its second argument for the rows, as often as it needs them. The other two raise BrokenTable.
    """

    write: Callable[[Path, Callable[[], Iterable[Rows]], Provenance], None]
    read: Callable[[Path], Iterator[Rows]]
    provenance: Callable[[Path], Provenance]


def format_of(path: Path) -> TableFormat:
    """The format that the name of `path` ends in.

    Raises:
        CommandError: there is no such format, or its library is not installed.
    """
    if path.suffix == ".parquet":
        _pyarrow()
        return TableFormat(_write_parquet, _read_parquet, _parquet_provenance)
    if path.suffix == ".npz":
        return NPZ
    raise CommandError(f"{path}: the name must end in .npz or .parquet", USAGE)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (BadZipFile, LookupError, ValueError, TypeError, EOFError) as error:  # a ValueError is what pyarrow raises
        raise BrokenTable(f"{path} is no table of embeddings: {error}") from error


def _write_npz(path: Path, groups: Callable[[], Iterable[Rows]], provenance: Provenance) -> None:
    count, types, shape = 0, dict.fromkeys(COLUMNS, np.dtype("<U1")), (0,)
    for rows in groups():
        count += len(rows)
        shape = rows.embedding.shape[1:]
        types = {name: np.promote_types(types[name], column.dtype) if column.dtype.kind == "U" else column.dtype
                 for name, column in rows.columns().items()}  # fmt: skip
    with ZipFile(path, "w", allowZip64=True) as archive:
        for name in COLUMNS:
            row_shape = shape if name == "embedding" else ()
            header = {"descr": npy.dtype_to_descr(types[name]), "fortran_order": False, "shape": (count, *row_shape)}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                for rows in groups():
                    file.write(np.ascontiguousarray(rows.columns()[name], types[name]).tobytes())
        with archive.open(f"{_NPZ_PROVENANCE}.npy", "w") as file:
            npy.write_array(file, np.array(json.dumps(asdict(provenance))), allow_pickle=False)


def _read_npz(path: Path) -> Iterator[Rows]:
    with _reading(path), ExitStack() as stack:
        archive = stack.enter_context(ZipFile(path))
        columns = {name: _NpyReader(stack.enter_context(archive.open(f"{name}.npy"))) for name in COLUMNS}
        total = columns["path"].shape[0]
        for start in range(0, total, _ROWS):
            yield Rows(**{name: column.read(min(_ROWS, total - start)) for name, column in columns.items()})


def _npz_provenance(path: Path) -> Provenance:
    with _reading(path), path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return Provenance(**json.loads(str(file[_NPZ_PROVENANCE])))


class _NpyReader:
    """Reads an array from an open `.npy`, some rows at a time."""

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


NPZ = TableFormat(_write_npz, _read_npz, _npz_provenance)


def _write_parquet(path: Path, groups: Callable[[], Iterable[Rows]], provenance: Provenance) -> None:
    pa, parquet = _pyarrow()
    text = {name: pa.string() for name in ("path", "model", "version")}
    numbers = {"width": pa.int32(), "height": pa.int32(), "bytes": pa.int64(), "mtime_ns": pa.int64()}
    types = {**text, **numbers, "embedding": pa.list_(pa.float32(), provenance.dimensions)}
    metadata = {_PARQUET_PROVENANCE: json.dumps(asdict(provenance))}
    schema = pa.schema([(name, types[name]) for name in COLUMNS], metadata=metadata)
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in groups():
            columns: dict[str, Any] = rows.columns()
            vectors = pa.array(columns.pop("embedding").reshape(-1), pa.float32())
            arrays = {name: pa.array(column.tolist(), types[name]) for name, column in columns.items()}
            arrays["embedding"] = pa.FixedSizeListArray.from_arrays(vectors, provenance.dimensions)
            writer.write_table(pa.table([arrays[name] for name in COLUMNS], schema=schema))


def _read_parquet(path: Path) -> Iterator[Rows]:
    _, parquet = _pyarrow()
    with _reading(path), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=list(COLUMNS)):
            columns = {name: batch.column(name) for name in COLUMNS}
            vectors = columns.pop("embedding")
            arrays = {name: np.array(column.to_pylist()) for name, column in columns.items()}
            yield Rows(**arrays, embedding=vectors.flatten().to_numpy().reshape(len(vectors), -1))


def _parquet_provenance(path: Path) -> Provenance:
    _, parquet = _pyarrow()
    with _reading(path):
        return Provenance(**json.loads((parquet.read_schema(path).metadata or {})[_PARQUET_PROVENANCE]))


def _pyarrow() -> tuple[Any, Any]:
    """The library, which is untyped and optional."""
    try:
        import pyarrow as pa  # noqa: PLC0415  optional
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        message = "Parquet needs pyarrow: pip install 'pvt-serve[parquet]', or write to a .npz"
        raise CommandError(message, USAGE) from error
    return pa, parquet
