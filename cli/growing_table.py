"""A table of embeddings that grows: parts beside it during a run, then one file. A killed run loses little."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout

from cli.rows import FileState, NewestRows, Provenance, Rows, regrouped
from cli.table_formats import NPZ, BrokenTable, format_of
from cli.terminal import USAGE, CommandError
from pvt_client import Embedding

_LOCK, _PROVENANCE = "lock", "made.json"


class GrowingTable:
    """The embeddings in the file `target`; as a context manager it keeps other runs away from the file.

    Rows stay in memory until there are `group` of them, and are then written as a part: under a temporary name, to the
    disk, then under the final name. So a run that is killed loses fewer than `group` rows. `finish` makes one file of
    the previous file and the parts, in the same way. `fresh` deletes what is there.

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
        # Mutable state: the rows of the next part, the files that have been written, and their provenance.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        if self._provenance is None:
            _write_durably(self._folder / _PROVENANCE, json.dumps(provenance.fields()).encode())
            self._provenance = provenance
        elif provenance != self._provenance:
            raise self._mismatch(provenance)

    def check_options(self, size: str | None, *, normalize: bool) -> None:
        """As `check`, before anything is embedded, by what is known then."""
        if self._provenance and (self._provenance.size, self._provenance.normalize) != (size, normalize):
            raise self._mismatch(replace(self._provenance, size=size, normalize=normalize))

    def is_of(self, model: str | None) -> bool:
        """Whether the rows are certainly of the model with that name; an alias, for example, leaves it open."""
        if model is None or self._provenance is None:
            return self._provenance is None
        return self._provenance.model == model or self._provenance.model.startswith(f"{model}.")

    def add(self, file: FileState, embedding: Embedding) -> None:
        """Add a row, which replaces an older one of the same path."""
        self._waiting.append((file, embedding))
        if len(self._waiting) >= self._group:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows."""
        if not self._waiting:
            return
        rows = Rows.of(self._waiting)
        columns: dict[str, Any] = rows.columns()
        number = max((int(part.stem) for part in self._parts()), default=0) + 1
        part = self._folder / f"{number:08}.npz"
        temporary = part.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **columns)
            os.fsync(file.fileno())
        temporary.replace(part)
        self._waiting.clear()
        self._written.add(rows)

    def finish(self) -> None:
        """Make one file of all rows; does nothing without new rows."""
        self.flush()
        if not self._parts() or self._provenance is None:
            return
        temporary = self._folder / "whole.tmp"
        self._format.write(
            temporary, lambda: regrouped(self._written.only(self._rows()), self._group), self._provenance
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self._target)
        for part in self._parts():
            part.unlink()
        (self._folder / _PROVENANCE).unlink(missing_ok=True)

    def _mismatch(self, other: Provenance) -> CommandError:
        message = f"{self._target} holds embeddings of {self._provenance}, these are of {other}"
        return CommandError(f"{message}; name another file, or give --fresh to begin anew", USAGE)

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

    def _read_provenance(self) -> Provenance | None:
        path = self._folder / _PROVENANCE
        try:
            if path.exists():
                return Provenance(**json.loads(path.read_bytes()))
            return self._format.provenance(self._target) if self._target.exists() else None
        except BrokenTable as error:
            raise CommandError(f"{error}; name another file, or give --fresh to begin anew") from error
        except (ValueError, TypeError) as error:
            raise CommandError(f"{path} is broken; give --fresh to begin anew") from error

    def _parts(self) -> Sequence[Path]:
        return sorted(self._folder.glob("[0-9]*.npz"))

    def _rows(self) -> Iterator[Rows]:
        """Everything that has been written: the file, then the parts."""
        try:
            if self._target.exists():
                yield from self._format.read(self._target)
            for part in self._parts():
                yield from NPZ.read(part)
        except BrokenTable as error:
            raise CommandError(f"{error}; remove it, and its images are embedded again") from error


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    temporary.replace(path)
