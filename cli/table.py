"""A table of embeddings that grows: parts beside it during a run, then one file. A killed run loses little."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from filelock import FileLock, Timeout

from cli.table_formats import NPZ, BrokenTable, Provenance, Rows, TableFormat, as_rows, format_of
from cli.terminal import USAGE, CommandError
from pvt_client import Embedding
from service.files import atomic_path

_LOCK = "lock"


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
def growing_table(target: Path, group: int, *, fresh: bool = False) -> Iterator["GrowingTable"]:
    """The table in the file `target`, which no other run can open meanwhile; `fresh` deletes what is there.

    Raises:
        CommandError: another run has the file, its content is not a table, or the format is not available.
    """
    form, folder = format_of(target), target.with_name(f"{target.name}.parts")
    with _locked(folder, target):
        for old in folder.glob("*" if fresh else "*.tmp"):
            if old.name != _LOCK:
                old.unlink()
        if fresh:
            target.unlink(missing_ok=True)
        table = GrowingTable(target, folder, form, group)
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

    def __init__(self, target: Path, folder: Path, form: TableFormat, group: int) -> None:
        self._target, self._folder, self._format, self._group = target, folder, form, group
        # Mutable state: the rows of the next part, the provenance of all rows, and of each file that has been written
        # the newest state; the last one as hashes, in about 200 bytes a file.
        self._waiting: list[tuple[FileState, Embedding]] = []
        self._provenance = self._read_provenance()
        self._newest: dict[int, int] = {}
        for rows in self._rows():
            self._note(rows)

    def __contains__(self, file: FileState) -> bool:
        return self._newest.get(hash(file.path)) == hash(file)

    def __len__(self) -> int:
        return len(self._newest)

    def check(self, provenance: Provenance) -> None:
        """Refuse embeddings of another provenance than those in the table.

        Raises:
            CommandError: they can't be compared.
        """
        self._provenance = self._provenance or provenance
        if provenance != self._provenance:
            message = f"{self._target} holds embeddings of {self._provenance}, these are of {provenance}"
            raise CommandError(f"{message}; name another file, or give --fresh to begin anew", USAGE)

    def check_options(self, size: str | None, *, normalize: bool) -> None:
        """As `check`, before anything is embedded, by what is known then."""
        if self._provenance:
            self.check(replace(self._provenance, size=size, normalize=normalize))

    def is_of(self, model: str | None) -> bool:
        """Whether the rows are certainly of the model with that name; an alias, for example, leaves it open."""
        if model is None or self._provenance is None:
            return self._provenance is None
        return self._provenance.model == model or self._provenance.model.startswith(f"{model}.")

    def add(self, file: FileState, embedding: Embedding) -> None:
        """Add a row, of a provenance that was checked; it replaces an older one of the same path."""
        self._waiting.append((file, embedding))
        if len(self._waiting) >= self._group:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows."""
        if not self._waiting:
            return
        files, found = zip(*self._waiting, strict=True)
        columns = {name: [getattr(file, name) for file in files] for name in FileState._fields}
        columns |= {name: [getattr(each, name) for each in found] for name in ("width", "height", "model", "version")}
        rows = as_rows(columns | {"embedding": [each.vector for each in found]})
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

    def _files(self) -> Iterator[tuple[Path, TableFormat]]:
        """Everything that has been written: the file, then the parts."""
        if self._target.exists():
            yield self._target, self._format
        yield from ((part, NPZ) for part in self._parts())

    def _parts(self) -> Sequence[Path]:
        return sorted(self._folder.glob("[0-9]*.npz"))

    def _read_provenance(self) -> Provenance | None:
        try:
            return next((form.provenance(path) for path, form in self._files()), None)
        except BrokenTable as error:
            raise CommandError(f"{error}; name another file, or give --fresh to begin anew") from error

    def _rows(self) -> Iterator[Rows]:
        try:
            for path, form in self._files():
                yield from form.read(path)
        except BrokenTable as error:
            raise CommandError(f"{error}; remove it, and its images are embedded again") from error

    def _note(self, rows: Rows) -> None:
        self._newest |= {hash(file.path): hash(file) for file in _files_of(rows)}

    def _newest_rows(self) -> Iterator[Rows]:
        """The newest row of each path, once, in groups of `group`, the last one smaller."""
        remaining, held = dict(self._newest), None
        for rows in self._rows():
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
