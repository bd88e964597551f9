"""A table of embeddings that grows: parts beside it during a run, then one file. A killed run loses little."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from cli.rows import FileState, NewestRows, Provenance, Rows, regrouped
from cli.table_formats import NPZ, BrokenTable, TableFormat, format_of
from cli.terminal import USAGE, CommandError
from pvt_client import Embedding
from service.files import atomic_path

_LOCK = "lock"


class GrowingTable:
    """The embeddings in the file `target`; as a context manager it keeps other runs away from the file.

    Rows stay in memory until there are `group` of them, and are then written as a part, itself a whole table: under a
    temporary name, to the disk, then under the final name. So a run that is killed loses fewer than `group` rows.
    `finish` makes one file of the previous file and the parts, in the same way. `fresh` deletes what is there.

    Raises:
        CommandError: another run has the file, its content is not a table, or the format is not available.
    """

    def __init__(self, target: Path, group: int, *, fresh: bool = False) -> None:
        self._format = format_of(target)
        self._target = target
        self._folder = target.with_name(f"{target.name}.parts")
        self._lock = FileLock(self._folder / _LOCK, timeout=0)
        self._group = group
        self._fresh = fresh
        # Mutable state: the rows of the next part, the files that have been written, and the provenance of all of them.
        self._waiting: list[tuple[FileState, Embedding]] = []
        self._written = NewestRows()
        self._provenance: Provenance | None = None

    def __enter__(self) -> Self:
        self._acquire()
        try:
            for old in self._folder.glob("*" if self._fresh else "*.tmp"):
                if old.name != _LOCK:
                    old.unlink()
            if self._fresh:
                self._target.unlink(missing_ok=True)
            self._provenance = self._read_provenance()
            for rows in self._rows():
                self._written.add(rows)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            self._release()

    def __contains__(self, file: FileState) -> bool:
        return file in self._written

    def __len__(self) -> int:
        return len(self._written)

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
        rows = Rows.of(self._waiting)
        number = max((int(part.stem) for part in self._parts()), default=0) + 1
        self._write(self._folder / f"{number:08}.npz", NPZ, lambda: [rows])
        self._waiting.clear()
        self._written.add(rows)

    def finish(self) -> None:
        """Make one file of all rows; does nothing without new rows."""
        self.flush()
        if parts := self._parts():
            self._write(self._target, self._format, lambda: regrouped(self._written.only(self._rows()), self._group))
            for part in parts:
                part.unlink()

    def _write(self, path: Path, form: TableFormat, groups: Callable[[], Iterable[Rows]]) -> None:
        assert self._provenance is not None  # noqa: S101  `check` comes before `add`
        with atomic_path(path, temporary=self._folder / "new.tmp", durable=True) as new:
            form.write(new, groups, self._provenance)

    def _acquire(self) -> None:
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except FileNotFoundError:
                continue  # another run has just removed the folder
            except Timeout as error:
                raise CommandError(f"another run is writing {self._target}") from error
            return

    def _release(self) -> None:
        """Remove the folder if nothing else is in it, and release the lock."""
        with suppress(OSError):
            if {each.name for each in self._folder.iterdir()} == {_LOCK}:
                (self._folder / _LOCK).unlink()
                self._folder.rmdir()
        self._lock.release()

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
