"""Embeddings of some pictures, column by column: what is written at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pvt_client.answers import Embedding

Column = NDArray[Any]


class Source(NamedTuple):
    """A file as it was before it was read; a file that differs in size or time is another one."""

    path: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The file at `path` now; raises OSError."""
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Columns of equal length, one row for each picture; `embedding` is float32 (rows, dimensions)."""

    path: Column
    width: Column
    height: Column
    bytes: Column
    mtime_ns: Column
    model: Column
    version: Column
    embedding: Column

    @classmethod
    def of(cls, rows: Sequence[tuple[Source, Embedding]]) -> Self:
        """The columns of `rows`, of which there must be some."""
        sources, found = [source for source, _ in rows], [each for _, each in rows]
        return cls(
            path=np.array([each.path for each in sources]),
            width=np.array([each.width for each in found], np.int32),
            height=np.array([each.height for each in found], np.int32),
            bytes=np.array([each.bytes for each in sources], np.int64),
            mtime_ns=np.array([each.mtime_ns for each in sources], np.int64),
            model=np.array([each.model for each in found]),
            version=np.array([each.version for each in found]),
            embedding=np.array([each.vector for each in found], np.float32),
        )

    def __len__(self) -> int:
        return len(self.path)

    def sources(self) -> Iterator[Source]:
        """The file of each row."""
        for path, size, mtime_ns in zip(self.path.tolist(), self.bytes.tolist(), self.mtime_ns.tolist(), strict=True):
            yield Source(path, size, mtime_ns)

    def rows(self, chosen: Column | slice) -> "Block":
        """Those rows."""
        return Block(**{name: column[chosen] for name, column in self.columns().items()})

    def columns(self) -> dict[str, Column]:
        """Every column by its name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


COLUMNS = tuple(each.name for each in fields(Block))


def regrouped(blocks: Iterable[Block], rows: int) -> Iterator[Block]:
    """The same rows in blocks of `rows`, the last one smaller."""
    held: list[Block] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        while count >= rows:
            whole = _joined(held)
            yield whole.rows(slice(rows))
            held, count = [whole.rows(slice(rows, None))], count - rows
    if count:
        yield _joined(held)


def _joined(blocks: Sequence[Block]) -> Block:
    return Block(**{name: np.concatenate([each.columns()[name] for each in blocks]) for name in COLUMNS})


class Latest:
    """The newest state of each file that has a row, in some 200 bytes for each."""

    def __init__(self) -> None:
        self._states: dict[int, int] = {}

    def __contains__(self, source: Source) -> bool:
        return self._states.get(_number(source.path)) == _number(source)

    def __len__(self) -> int:
        return len(self._states)

    def add(self, source: Source) -> None:
        """A row of `source` has been written, and takes the place of any other of that path."""
        self._states[_number(source.path)] = _number(source)

    def only(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """`blocks` with the newest row of each path, and none of them twice."""
        left = dict(self._states)
        for block in blocks:
            chosen = np.array([self._take(left, source) for source in block.sources()], bool)
            if chosen.any():
                yield block.rows(chosen)

    @staticmethod
    def _take(left: dict[int, int], source: Source) -> bool:
        number = _number(source.path)
        if left.get(number) != _number(source):
            return False
        del left[number]
        return True


def _number(value: object) -> int:
    return int.from_bytes(blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=8).digest())
