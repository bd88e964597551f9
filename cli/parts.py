"""A table that grows: parts beside it while a run lasts, then one file, whatever ends a run in between."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from cli import npz_table, parquet_table
from cli.blocks import Block, Latest, Source, regrouped
from cli.made import BrokenTable, Made
from cli.terminal import USAGE, CommandError
from pvt_client.answers import Embedding

_FORMATS: dict[str, ModuleType] = {".npz": npz_table, ".parquet": parquet_table}
_LOCK, _MADE = "lock", "made.json"


class GrowingTable:
    """The embeddings in the file `target`; use as a context manager, which keeps other runs away from it.

    Rows are kept in memory until there are `rows` of them, then written as a part: under a temporary name, to the disk,
    and only then under its own. So a run that is killed loses at most that many. `finish` makes one file of the one
    that there was and of the parts, in the same way. `fresh` forgets what is there.

    Raises:
        CommandError: another run holds it, what is there is not what this class wrote, or the format is not at hand.
    """

    def __init__(self, target: Path, rows: int, *, fresh: bool = False) -> None:
        if target.suffix not in _FORMATS:
            raise CommandError(f"{target}: the name must end in {' or '.join(sorted(_FORMATS))}", USAGE)
        self._target = target
        self._format = _FORMATS[target.suffix]
        self._format.require()
        self._folder = target.with_name(f"{target.name}.parts")
        self._rows = rows
        self._fresh = fresh
        # Mutable state: the rows of the part to come, what has been written, how it was made, and the lock's file.
        self._waiting: list[tuple[Source, Embedding]] = []
        self._latest = Latest()
        self._made: Made | None = None
        self._lock = -1

    def __enter__(self) -> Self:
        self._lock = self._locked()
        try:
            for left_over in self._folder.glob("*" if self._fresh else "*.tmp"):
                if left_over.name != _LOCK:
                    left_over.unlink()
            if self._fresh:
                self._target.unlink(missing_ok=True)
            self._made = self._how()
            for block in self._blocks():
                for source in block.sources():
                    self._latest.add(source)
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

    def __contains__(self, source: Source) -> bool:
        return source in self._latest

    def __len__(self) -> int:
        return len(self._latest)

    def check(self, made: Made) -> None:
        """Refuse embeddings that were made otherwise than those which are there.

        Raises:
            CommandError: they would not be comparable.
        """
        if self._made is None:
            _replace(self._folder / _MADE, json.dumps(made.fields()).encode())
            self._made = made
        elif made != self._made:
            raise self._other(str(made))

    def check_asked(self, size: str | None, *, normalize: bool) -> None:
        """The same before anything is embedded, by what is known then."""
        if self._made and (self._made.size, self._made.normalize) != (size, normalize):
            raise self._other(str(replace(self._made, size=size, normalize=normalize)))

    def is_of(self, model: str | None) -> bool:
        """Whether what is there is certainly of the model asked for; an alias, for one, leaves it open."""
        if model is None or self._made is None:
            return self._made is None
        return self._made.model == model or self._made.model.startswith(f"{model}.")

    def add(self, source: Source, embedding: Embedding) -> None:
        """A row, which takes the place of an older one of the same path."""
        self._waiting.append((source, embedding))
        if len(self._waiting) >= self._rows:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if not self._waiting:
            return
        block = Block.of(self._waiting)
        columns: dict[str, Any] = block.columns()
        number = max((int(part.stem) for part in self._parts()), default=0) + 1
        part = self._folder / f"{number:08}.npz"
        temporary = part.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **columns)
            os.fsync(file.fileno())
        temporary.replace(part)
        self._waiting.clear()
        for source in block.sources():
            self._latest.add(source)

    def finish(self) -> None:
        """Make one file of all rows; nothing is done where nothing is new."""
        self.flush()
        if not self._parts() or self._made is None:
            return
        temporary = self._folder / "whole.tmp"
        self._format.write(temporary, lambda: regrouped(self._latest.only(self._blocks()), self._rows), self._made)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self._target)
        for part in self._parts():
            part.unlink()
        (self._folder / _MADE).unlink(missing_ok=True)

    def _other(self, made: str) -> CommandError:
        told = f"{self._target} holds embeddings of {self._made}, these are of {made}"
        return CommandError(f"{told}; name another file, or give --fresh to begin anew", USAGE)

    def _locked(self) -> int:
        """The descriptor of the lock, in the folder that is there and not in one that a run has just removed."""
        self._target.parent.mkdir(parents=True, exist_ok=True)
        path = self._folder / _LOCK
        while True:
            self._folder.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(lock).st_ino == path.stat().st_ino:
                        return lock
                except BlockingIOError as error:
                    os.close(lock)
                    raise CommandError(f"another run is writing {self._target}") from error
                os.close(lock)

    def _release(self) -> None:
        """Give the lock back, and remove the folder if nothing else is in it."""
        with suppress(OSError):
            if {each.name for each in self._folder.iterdir()} == {_LOCK}:
                (self._folder / _LOCK).unlink()
                self._folder.rmdir()
        os.close(self._lock)

    def _how(self) -> Made | None:
        made, path = None, self._folder / _MADE
        try:
            if path.exists():
                made = Made(**json.loads(path.read_bytes()))
            elif self._target.exists():
                made = self._format.made_of(self._target)
        except BrokenTable as error:
            raise CommandError(f"{error}; name another file, or give --fresh to begin anew") from error
        except (ValueError, TypeError) as error:
            raise CommandError(f"{path} is broken; give --fresh to begin anew") from error
        return made

    def _parts(self) -> Sequence[Path]:
        return sorted(self._folder.glob("[0-9]*.npz"))

    def _blocks(self) -> Iterator[Block]:
        """All that has been written: the file, then the parts."""
        try:
            if self._target.exists():
                yield from self._format.read(self._target)
            for part in self._parts():
                yield from npz_table.read(part)
        except BrokenTable as error:
            raise CommandError(f"{error}; remove it and its rows are made again") from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    temporary.replace(path)
