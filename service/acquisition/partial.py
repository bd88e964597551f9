"""A file that is not whole yet, beside what is known of it."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError


class Note(BaseModel):
    """What a server said of a file: its ETag, its size in bytes, its SHA-256 and the revision it belongs to."""

    model_config = ConfigDict(frozen=True)

    etag: str | None = None
    total: int | None = None
    sha256: str | None = None
    revision: str | None = None

    @property
    def strong_etag(self) -> str | None:
        """The ETag, if it promises the same bytes."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag


class Part:
    """The beginning of `target`. Open it, add to it, finish it; it survives the process between any two of these.

    A finished target without anyone to take it counts as a part again when it is opened.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._path = target.with_name(f"{target.name}.part")
        self._note_path = target.with_name(f"{target.name}.json")
        # Mutable state: the open file, the bytes that are in it and their hash, and what is known of the whole.
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self.size = 0
        self.note = Note()

    @property
    def whole(self) -> bool:
        """Whether every byte is here."""
        return self.note.total is not None and self.size == self.note.total > 0

    def open(self) -> int:
        """Read what is there of it; its size.

        Raises:
            OSError: it can't be.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.note = Note.model_validate_json(self._note_path.read_bytes())
        except (FileNotFoundError, ValidationError):  # without it nobody knows what the bytes belong to
            self.note = Note()
            self._path.unlink(missing_ok=True)
        if self.note.total is not None and self.target.exists():
            self.target.replace(self._path)
        self._file = self._path.open("a+b")
        self._file.seek(0)
        self._hash = hashlib.file_digest(self._file, "sha256")
        self.size = self._file.tell()
        if self.note.total is not None and self.size > self.note.total:
            self.go_on(0, Note())
        return self.size

    def close(self) -> None:
        """Leave it as it is."""
        if self._file:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def conditions(self, sha256: str | None) -> dict[str, str]:
        """Headers that ask for the rest; none, where nothing would show that it belongs to what is here."""
        if not self.size or not (self.note.strong_etag or sha256):
            return {}
        condition = {"If-Range": self.note.strong_etag} if self.note.strong_etag else {}
        return {"Range": f"bytes={self.size}-", **condition}

    def go_on(self, start: int, note: Note) -> None:
        """Drop what lies behind `start`, which is all or nothing, and note what is known now.

        Raises:
            OSError: it can't be written.
        """
        assert self._file  # noqa: S101  it is open
        if start != self.size:
            self._file.truncate(0)
            self._hash, self.size = hashlib.sha256(), 0
        if note != self.note or not self._note_path.exists():
            self._note_path.write_text(note.model_dump_json(exclude_none=True))
            self.note = note

    def add(self, chunk: bytes) -> None:
        """Add bytes.

        Raises:
            OSError: they can't be written.
        """
        assert self._file  # noqa: S101  it is open
        self._file.write(chunk)
        self._file.flush()
        self._hash.update(chunk)
        self.size += len(chunk)

    def sha256(self) -> str:
        """Of what is here."""
        return self._hash.hexdigest()

    def drop(self) -> None:
        """Forget it."""
        self.close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._note_path.unlink(missing_ok=True)
        self.size, self.note = 0, Note()

    def finish(self) -> None:
        """Make it `target`.

        Raises:
            OSError: it can't be written.
        """
        assert self._file  # noqa: S101  it is open
        os.fsync(self._file.fileno())
        self.close()
        self._path.replace(self.target)

    def discard(self) -> None:
        """Leave nothing of it, the finished target included."""
        self.drop()
        with suppress(OSError):
            self.target.unlink(missing_ok=True)
