"""A table of embeddings that grows: parts beside it during a run, then one file. A killed run loses little.

A table is a `.npz`, an array for each column, or a `.parquet`, a row group for each group of rows. Both are written and
read without having all of the table in memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, Self
from zipfile import BadZipFile, ZipFile

import numpy as np
from filelock import FileLock, Timeout
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray

from cli.terminal import USAGE, CommandError
from pvt_client import Embedding
from service.files import atomic_path

Rows = NDArray[np.void]
"""A structured array with a row for each image and a field for each of COLUMNS; `embedding` is (dimensions,)."""
COLUMNS: Mapping[str, type[np.generic]] = {
    "path": np.str_, "width": np.int32, "height": np.int32, "bytes": np.int64, "mtime_ns": np.int64,
    "model": np.str_, "version": np.str_, "embedding": np.float32,
}  # fmt: skip
_NPZ_PROVENANCE, _PARQUET_PROVENANCE = "made", b"pvt-serve"
_ROWS = 4096  # read at a time
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Provenance:
    """By which model and in which way embeddings were computed; `size` None: the model's own.

    Only embeddings of equal provenance can be compared, so a table has one.
    """

    model: str
    version: str
    dimensions: int
    size: str | None
    normalize: bool

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
    """How a table of one or more rows is written and read.

    `write` calls its second argument for the rows, as often as it needs them. `read` raises
    CommandError if the file is not a table.
    """

    write: Callable[[Path, Callable[[], Iterable[Rows]], Provenance], None]
    read: Callable[[Path], Iterator[tuple[Provenance, Rows]]]


class FileState(NamedTuple):
    """A file as it was before it was read; with another size or time it counts as another file."""

    path: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The state of the file at `path` now; raises OSError."""
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)


@contextmanager
def growing_table(
    target: Path, group: int, *, size: str | None = None, normalize: bool = False, fresh: bool = False
) -> Iterator["GrowingTable"]:
    """The table in the file `target`, which no other run can open meanwhile; `fresh` deletes what is there.

    Its embeddings are of input of `size`, None for the model's own, and scaled to length 1 if `normalize`.

    Raises:
        CommandError: another run has the file, its content is not a table or one of other embeddings, or the format is
            not available.
    """
    form, folder = format_of(target), target.with_name(f"{target.name}.parts")
    with _locked(folder, target):
        for old in folder.glob("*" if fresh else "*.tmp"):
            if old.name != _LOCK:
                old.unlink()
        if fresh:
            target.unlink(missing_ok=True)
        table = GrowingTable(target, folder, form, group, size, normalize=normalize)
        try:
            yield table
        finally:
            table.flush()


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """Makes `folder` and locks it; removes it if it is empty in the end."""
    lock = FileLock(folder / _LOCK, timeout=0)
    while not lock.is_locked:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another run has just removed the folder
            try:
                lock.acquire()
            except Timeout as error:
                raise CommandError(f"another run is writing {target}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            if {each.name for each in folder.iterdir()} == {_LOCK}:
                (folder / _LOCK).unlink()
                folder.rmdir()
        lock.release()


class GrowingTable:
    """The embeddings in the file `target`.

    Rows stay in memory until there are `group` of them, and are then written into `folder` as a part, itself a whole
    table: under a temporary name, to the disk, then under the final name. So a run that is killed loses fewer than
    `group` rows. `finish` makes one file of the previous file and the parts, in the same way.
    """

    def __init__(
        self, target: Path, folder: Path, form: TableFormat, group: int, size: str | None, *, normalize: bool
    ) -> None:
        self._target, self._folder, self._format, self._group = target, folder, form, group
        self._size, self._normalize = size, normalize
        # Mutable state: the rows of the next part, the provenance of all rows, and of each file that has been written
        # the newest state; the last one as hashes, in about 200 bytes a file.
        self._waiting: list[tuple[object, ...]] = []
        self._provenance: Provenance | None = None
        self._newest: dict[int, int] = {}
        for provenance, rows in self._read():
            self._provenance = provenance
            self._note(rows)
        if self._provenance:
            self._check(replace(self._provenance, size=size, normalize=normalize))

    def __contains__(self, file: FileState) -> bool:
        return self._newest.get(hash(file.path)) == hash(file)

    def __len__(self) -> int:
        return len(self._newest)

    def is_of(self, model: str | None) -> bool:
        """Whether the rows are certainly of the model with that name; an alias, for example, leaves it open."""
        if model is None or self._provenance is None:
            return self._provenance is None
        return self._provenance.model == model or self._provenance.model.startswith(f"{model}.")

    def add(self, file: FileState, embedding: Embedding) -> bool:
        """Add a row, which replaces an older one of the same path; returns False if there is one of that very file.

        Raises:
            CommandError: the embedding can't be compared with those in the table.
        """
        model, version, vector = embedding.model, embedding.version, embedding.vector
        self._check(Provenance(model, version, len(vector), self._size, self._normalize))
        if file in self:
            return False
        size = embedding.width, embedding.height
        self._waiting.append((file.path, *size, file.bytes, file.mtime_ns, model, version, vector))
        if len(self._waiting) >= self._group:
            self.flush()
        return True

    def flush(self) -> None:
        """Write the waiting rows."""
        if not self._waiting:
            return
        rows = as_rows(dict(zip(COLUMNS, zip(*self._waiting, strict=True), strict=True)))
        number = max((int(part.stem) for part in self._parts()), default=0) + 1
        self._write(self._folder / f"{number:08}.npz", NPZ, lambda: [rows])
        self._waiting.clear()
        self._note(rows)

    def finish(self) -> None:
        """Make one file of all rows; does nothing without new rows."""
        self.flush()
        if parts := self._parts():
            self._write(self._target, self._format, self._newest_rows)
            for part in parts:
                part.unlink()

    def _write(self, path: Path, form: TableFormat, groups: Callable[[], Iterable[Rows]]) -> None:
        assert self._provenance is not None  # noqa: S101  `check` comes before `add`
        with atomic_path(path, temporary=self._folder / "new.tmp", durable=True) as new:
            form.write(new, groups, self._provenance)

    def _check(self, provenance: Provenance) -> None:
        self._provenance = self._provenance or provenance
        if provenance != self._provenance:
            message = f"{self._target} holds embeddings of {self._provenance}, these are of {provenance}"
            raise CommandError(f"{message}; name another file, or give --fresh to begin anew", USAGE)

    def _parts(self) -> Sequence[Path]:
        return sorted(self._folder.glob("[0-9]*.npz"))

    def _read(self) -> Iterator[tuple[Provenance, Rows]]:
        """All that has been written: the file, then the parts."""
        advice = "name another file, or give --fresh to begin anew"
        try:
            if self._target.exists():
                yield from self._format.read(self._target)
            advice = "remove it, and its images are embedded again"
            for part in self._parts():
                yield from NPZ.read(part)
        except CommandError as error:
            raise CommandError(f"{error}; {advice}") from error

    def _note(self, rows: Rows) -> None:
        self._newest |= {hash(file.path): hash(file) for file in _files_of(rows)}

    def _newest_rows(self) -> Iterator[Rows]:
        """The newest row of each path, once, in groups of `group`, the last one smaller."""
        remaining, held = dict(self._newest), None
        for _, rows in self._read():
            chosen = np.zeros(len(rows), bool)
            for i, file in enumerate(_files_of(rows)):
                if remaining.get(path := hash(file.path)) == hash(file):
                    chosen[i] = True
                    del remaining[path]
            held = rows[chosen] if held is None else np.concatenate([held, rows[chosen]])
            while len(held) >= self._group:
                yield held[: self._group]
                held = held[self._group :]
        if held is not None and len(held):
            yield held


def _files_of(rows: Rows) -> Iterator[FileState]:
    return map(FileState._make, rows[["path", "bytes", "mtime_ns"]].tolist())


def format_of(path: Path) -> TableFormat:
    """The format that the name of `path` ends in.

    Raises:
        CommandError: there is no such format, or its library is not installed.
    """
    if path.suffix == ".parquet":
        _pyarrow()
        return TableFormat(_write_parquet, _read_parquet)
    if path.suffix == ".npz":
        return NPZ
    raise CommandError(f"{path}: the name must end in .npz or .parquet", USAGE)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (BadZipFile, LookupError, ValueError, TypeError, EOFError) as error:  # a ValueError is what pyarrow raises
        raise CommandError(f"{path} is no table of embeddings: {error}") from error


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


def _read_npz(path: Path) -> Iterator[tuple[Provenance, Rows]]:
    with _reading(path), ZipFile(path) as archive, ExitStack() as stack:
        with archive.open(f"{_NPZ_PROVENANCE}.npy") as file:
            provenance = Provenance(**json.loads(str(npy.read_array(file, allow_pickle=False))))
        columns = [_blocks(stack.enter_context(archive.open(f"{name}.npy"))) for name in COLUMNS]
        for blocks in zip(*columns, strict=True):
            yield provenance, as_rows(dict(zip(COLUMNS, blocks, strict=True)))


def _blocks(file: IO[bytes]) -> Iterator[NDArray[Any]]:
    """The array of an open `.npy`, some rows at a time."""
    if npy.read_magic(file) != (1, 0):
        raise ValueError("an array of another version")
    (total, *shape), _, kind = npy.read_array_header_1_0(file)
    for start in range(0, total, _ROWS):
        rows = min(_ROWS, total - start)
        yield np.frombuffer(file.read(rows * prod(shape) * kind.itemsize), kind).reshape(rows, *shape)


NPZ = TableFormat(_write_npz, _read_npz)


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


def _read_parquet(path: Path) -> Iterator[tuple[Provenance, Rows]]:
    _, parquet = _pyarrow()
    with _reading(path), parquet.ParquetFile(path) as file:
        provenance = Provenance(**json.loads((file.schema_arrow.metadata or {})[_PARQUET_PROVENANCE]))
        for batch in file.iter_batches(_ROWS, columns=list(COLUMNS)):
            columns = {name: batch.column(name).to_pylist() for name in COLUMNS if name != "embedding"}
            vectors = batch.column("embedding").flatten().to_numpy().reshape(len(batch), -1)
            yield provenance, as_rows(columns | {"embedding": vectors})


def _pyarrow() -> tuple[Any, Any]:
    """The library, which is untyped and optional."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        message = "Parquet needs pyarrow: pip install 'pvt-serve[parquet]', or write to a .npz"
        raise CommandError(message, USAGE) from error
    return pa, parquet
