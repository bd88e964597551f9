"""Tables of embeddings as files: `.npz`, an array for each column, and `.parquet`, a row group for each group of rows.

Both are written and read without having all of the table in memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, Self
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray

from cli.terminal import USAGE, CommandError
from pvt_client import Embedding

Rows = NDArray[np.void]
"""A structured array with a row for each image and a field for each of COLUMNS; `embedding` is (dimensions,)."""
COLUMNS: Mapping[str, type[np.generic]] = {
    "path": np.str_, "width": np.int32, "height": np.int32, "bytes": np.int64, "mtime_ns": np.int64,
    "model": np.str_, "version": np.str_, "embedding": np.float32,
}  # fmt: skip
_NPZ_PROVENANCE, _PARQUET_PROVENANCE = "made", b"pvt-serve"
_ROWS = 4096  # read at a time


class BrokenTable(Exception):
    """A file that is not a table of embeddings; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """By which model and in which way embeddings were computed; `size` None: the model's own.

    Only embeddings of equal provenance can be compared, so a table has one.
    """

    model: str
    version: str
    dimensions: int
    size: str | None
    normalize: bool

    @classmethod
    def of(cls, embedding: Embedding, size: str | None, *, normalize: bool) -> Self:
        """The provenance of `embedding`."""
        model, version, dimensions = embedding.model, embedding.version, len(embedding.vector)
        return cls(model=model, version=version, dimensions=dimensions, size=size, normalize=normalize)

    def __str__(self) -> str:
        size = "" if self.size is None else f", size {self.size}"
        return f"{self.model}@{self.version}{size}{', normalized' if self.normalize else ''}"


def as_rows(columns: Mapping[str, ArrayLike]) -> Rows:
    """The rows of `columns` of equal length, which are those of COLUMNS."""
    arrays = {name: np.asarray(columns[name], kind) for name, kind in COLUMNS.items()}
    rows = np.empty(len(arrays["path"]), [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
    for name, array in arrays.items():
        rows[name] = array
    return rows


class TableFormat(NamedTuple):
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
    count, types = 0, None
    for rows in groups():
        count += len(rows)
        types = rows.dtype if types is None else np.promote_types(types, rows.dtype)  # room for the longest path
    assert types is not None  # noqa: S101  a table has rows
    with ZipFile(path, "w", allowZip64=True) as archive:
        for name in COLUMNS:
            kind, shape = types[name].base, (count, *types[name].shape)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(file, header)
                for rows in groups():
                    file.write(rows[name].astype(kind).tobytes())
        with archive.open(f"{_NPZ_PROVENANCE}.npy", "w") as file:
            npy.write_array(file, np.array(json.dumps(asdict(provenance))), allow_pickle=False)


def _read_npz(path: Path) -> Iterator[Rows]:
    with _reading(path), ZipFile(path) as archive, ExitStack() as stack:
        columns = [_blocks(stack.enter_context(archive.open(f"{name}.npy"))) for name in COLUMNS]
        for blocks in zip(*columns, strict=True):
            yield as_rows(dict(zip(COLUMNS, blocks, strict=True)))


def _blocks(file: IO[bytes]) -> Iterator[NDArray[Any]]:
    """The array of an open `.npy`, some rows at a time."""
    if npy.read_magic(file) != (1, 0):
        raise ValueError("an array of another version")
    (total, *shape), _, kind = npy.read_array_header_1_0(file)
    for start in range(0, total, _ROWS):
        rows = min(_ROWS, total - start)
        yield np.frombuffer(file.read(rows * prod(shape) * kind.itemsize), kind).reshape(rows, *shape)


def _npz_provenance(path: Path) -> Provenance:
    with _reading(path), path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return Provenance(**json.loads(str(file[_NPZ_PROVENANCE])))


NPZ = TableFormat(_write_npz, _read_npz, _npz_provenance)


def _write_parquet(path: Path, groups: Callable[[], Iterable[Rows]], provenance: Provenance) -> None:
    pa, parquet = _pyarrow()
    types = {name: pa.string() if kind is np.str_ else pa.from_numpy_dtype(kind) for name, kind in COLUMNS.items()}
    types["embedding"] = pa.list_(types["embedding"], provenance.dimensions)
    schema = pa.schema(types, metadata={_PARQUET_PROVENANCE: json.dumps(asdict(provenance))})
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in groups():
            columns = {name: rows[name].tolist() for name in COLUMNS if name != "embedding"}
            vectors = pa.array(rows["embedding"].ravel())
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(vectors, provenance.dimensions)
            writer.write_table(pa.table(columns, schema=schema))


def _read_parquet(path: Path) -> Iterator[Rows]:
    _, parquet = _pyarrow()
    with _reading(path), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=list(COLUMNS)):
            columns = {name: batch.column(name).to_pylist() for name in COLUMNS if name != "embedding"}
            vectors = batch.column("embedding").flatten().to_numpy().reshape(len(batch), -1)
            yield as_rows(columns | {"embedding": vectors})


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
