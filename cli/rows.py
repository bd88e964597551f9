"""Embeddings of several images column by column, and how they were computed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pvt_client import Embedding

Column = NDArray[Any]


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
        dimensions = len(embedding.vector)
        return cls(
            model=embedding.model, version=embedding.version, dimensions=dimensions, size=size, normalize=normalize
        )

    def __str__(self) -> str:
        size = "" if self.size is None else f", size {self.size}"
        return f"{self.model}@{self.version}{size}{', normalized' if self.normalize else ''}"


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


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Columns of equal length, one row for each image; `embedding` is float32 (rows, dimensions)."""

    path: Column
    width: Column
    height: Column
    bytes: Column
    mtime_ns: Column
    model: Column
    version: Column
    embedding: Column

    @classmethod
    def of(cls, embeddings: Sequence[tuple[FileState, Embedding]]) -> Self:
        """The columns of one or more `embeddings`."""
        files, found = zip(*embeddings, strict=True)
        return cls(
            path=np.array([each.path for each in files]),
            width=np.array([each.width for each in found], np.int32),
            height=np.array([each.height for each in found], np.int32),
            bytes=np.array([each.bytes for each in files], np.int64),
            mtime_ns=np.array([each.mtime_ns for each in files], np.int64),
            model=np.array([each.model for each in found]),
            version=np.array([each.version for each in found]),
            embedding=np.array([each.vector for each in found], np.float32),
        )

    def __len__(self) -> int:
        return len(self.path)

    def files(self) -> Iterator[FileState]:
        """The file of each row."""
        for path, size, mtime_ns in zip(self.path.tolist(), self.bytes.tolist(), self.mtime_ns.tolist(), strict=True):
            yield FileState(path, size, mtime_ns)

    def select(self, chosen: Column | slice) -> "Rows":
        """The `chosen` rows."""
        return Rows(**{name: column[chosen] for name, column in self.columns().items()})

    def columns(self) -> dict[str, Column]:
        """Every column by its name."""
        return {name: getattr(self, name) for name in COLUMNS}


COLUMNS = tuple(each.name for each in fields(Rows))


def regrouped(groups: Iterable[Rows], size: int) -> Iterator[Rows]:
    """The same rows in groups of `size`, the last one smaller."""
    held: list[Rows] = []
    count = 0
    for group in groups:
        held.append(group)
        count += len(group)
        while count >= size:
            joined = _joined(held)
            yield joined.select(slice(size))
            held, count = [joined.select(slice(size, None))], count - size
    if count:
        yield _joined(held)


def _joined(groups: Sequence[Rows]) -> Rows:
    return Rows(**{name: np.concatenate([each.columns()[name] for each in groups]) for name in COLUMNS})


class NewestRows:
    """The newest state of each file that has a row, in about 200 bytes a file."""

    def __init__(self) -> None:
        self._states: dict[int, int] = {}

    def __contains__(self, file: FileState) -> bool:
        return self._states.get(_number(file.path)) == _number(file)

    def __len__(self) -> int:
        return len(self._states)

    def add(self, rows: Rows) -> None:
        """Take note of `rows`; each replaces any older row of the same path."""
        self._states |= {_number(file.path): _number(file) for file in rows.files()}

    def only(self, groups: Iterable[Rows]) -> Iterator[Rows]:
        """`groups` with the newest row of each path, once."""
        remaining = dict(self._states)

        def take(file: FileState) -> bool:
            if is_newest := remaining.get(number := _number(file.path)) == _number(file):
                del remaining[number]
            return is_newest

        for group in groups:
            chosen = np.array([take(file) for file in group.files()], bool)
            if chosen.any():
                yield group.select(chosen)


def _number(value: object) -> int:
    return int.from_bytes(blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=8).digest())
