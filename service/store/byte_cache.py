"""Copies of remote files in a folder of limited size, which several threads and processes share.

Locks are the kernel's (`flock`): readers can share them, and they end with their process, whatever ends it.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from threading import Event
from time import time_ns
from typing import BinaryIO

import structlog

from service.errors import ServiceError, ShuttingDown, StoreCacheFailed, WeightsCorrupt, WeightsDigestMismatch
from service.files import file_sha256
from service.store.cards import CARD_FILE

log = structlog.get_logger(component="store")

CHUNK_BYTES = 1 << 20
LOCK_SECONDS = 0.05  # between two attempts to take a lock that another holds
MAX_UNKNOWN_BYTES = 256_000_000  # of a file whose size is not known: reference images
_LOCKS = ".locks"
_PART = ".part"


class SourceFailed(Exception):
    """A file could not be read from its source; the cause is why."""


class _WriteFailed(Exception):
    def __init__(self, reason: OSError) -> None:
        super().__init__()
        self.reason = reason


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file: the path of its copy, its SHA-256, its name in messages, and how to open its source.

    `bytes` is its size, None if that is not known.
    """

    path: Path
    sha256: str
    bytes: int | None
    name: str
    open: Callable[[], BinaryIO]


class ByteCache:
    """The copies under `root`, `limit` bytes at the most; those in use are never removed."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self.limit = limit
        self._closed = Event()

    def close(self) -> None:
        """Stop downloads under way; their bytes are kept for the next attempt."""
        self._closed.set()

    @contextmanager
    def holding(self, folder: Path, files: list[CachedFile]) -> Iterator[None]:
        """All `files`, which lie in `folder`, are present and whole for as long as the context lasts.

        Raises:
            WeightsCorrupt, WeightsDigestMismatch: the source has other bytes than it should.
            StoreCacheFailed: no room, or the folder can't be written.
            ShuttingDown: `close` was called meanwhile.
            SourceFailed: a source could not be read.
        """
        with self._locked(self._key(folder), fcntl.LOCK_SH):
            if not all(_is_whole(file) for file in files):
                with self._locked("cache", fcntl.LOCK_EX):  # one at a time, since they need the same room
                    for file in files:
                        if not _is_whole(file):
                            self._fetch(file)
            yield

    def _fetch(self, file: CachedFile) -> None:
        """Download `file`, from where an earlier attempt ended."""
        part = file.path.with_name(f".{file.sha256[:16]}{_PART}")
        try:
            file.path.unlink(missing_ok=True)
            file.path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(file, part)
            self._download(file, part)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                part.unlink(missing_ok=True)
            raise self._failed(error) from error

    def _download(self, file: CachedFile, part: Path) -> None:
        limit = MAX_UNKNOWN_BYTES if file.bytes is None else file.bytes
        with part.open("ab+") as copy:
            with _opened(file) as source:
                sha256, size = _resume(source, copy, limit)
                while size <= limit and (chunk := source.read(CHUNK_BYTES)):
                    if self._closed.is_set():
                        raise ShuttingDown("the service is shutting down")
                    _write(copy, chunk)
                    sha256.update(chunk)
                    size += len(chunk)
            copy.flush()
            os.fsync(copy.fileno())
        if sha256.hexdigest() == file.sha256:
            part.replace(file.path)
            log.info("weights_fetched", file=file.name, bytes=size)
            return
        part.unlink()
        if file.bytes is not None and size != file.bytes:
            fault = f"truncated: {size}" if size < file.bytes else "too long: more than"
            raise WeightsCorrupt(f"{file.name}: {fault} bytes, the card says {file.bytes}; copy the file again")
        raise WeightsDigestMismatch(f"{file.name}: SHA-256 is {sha256.hexdigest()}, the card says {file.sha256}")

    def _make_room(self, file: CachedFile, part: Path) -> None:
        """Remove the least recently used files until `file` fits.

        Raises:
            StoreCacheFailed: it never fits, or not while others are in use.
        """
        needed = file.bytes or 0
        if needed > self.limit:
            raise StoreCacheFailed(
                f"{file.name} has {needed} bytes, more than the {self.limit} of PVT_STORE_CACHE_MB; raise it"
            )
        files = sorted((each for each in self._files() if each[0] != part), key=lambda each: each[1].st_atime_ns)
        excess = sum(stat.st_size for _, stat in files) + needed - self.limit
        for path, stat in files:
            if excess <= 0:
                return
            with suppress(BlockingIOError), self._locked(self._key(path.parent), fcntl.LOCK_EX, wait=False):
                path.unlink(missing_ok=True)
                log.info("weights_evicted", file=str(path.relative_to(self.root)), bytes=stat.st_size)
                excess -= stat.st_size
        if excess > 0:
            raise StoreCacheFailed(
                f"no room for {file.name}: {excess} bytes too many while models are being loaded; "
                "ask again, or raise PVT_STORE_CACHE_MB"
            )

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files that count: all but cards, aliases and locks. What can't be looked at can't be removed either."""
        for path in self.root.glob("*/*/*/*"):
            with suppress(OSError):
                stat = path.stat()
                if path.name != CARD_FILE and S_ISREG(stat.st_mode):
                    yield path, stat

    def _key(self, folder: Path) -> str:
        return hashlib.sha256(str(folder.relative_to(self.root)).encode()).hexdigest()[:32]

    @contextmanager
    def _locked(self, name: str, kind: int, *, wait: bool = True) -> Iterator[None]:
        try:
            (self.root / _LOCKS).mkdir(parents=True, exist_ok=True)
            lock = os.open(self.root / _LOCKS / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._failed(error) from error
        try:
            while True:
                try:
                    fcntl.flock(lock, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not wait:
                        raise
                    if self._closed.wait(LOCK_SECONDS):
                        raise ShuttingDown("the service is shutting down") from None
            yield
        finally:
            os.close(lock)

    def _failed(self, error: OSError) -> StoreCacheFailed:
        return StoreCacheFailed(f"{self.root}: {error.strerror or error}; PVT_STORE_CACHE_DIR names the folder")


def _is_whole(file: CachedFile) -> bool:
    """Whether the copy has the right bytes; if so, it counts as used now."""
    try:
        stat = file.path.stat()
        whole = file.bytes in {None, stat.st_size} and file_sha256(file.path) == file.sha256
    except OSError:  # fetching the file again shows what is wrong, if more is than that it is missing
        return False
    if whole:
        with suppress(OSError):  # a folder that can only be read
            os.utime(file.path, ns=(time_ns(), stat.st_mtime_ns))
    return whole


@contextmanager
def _opened(file: CachedFile) -> Iterator[BinaryIO]:
    """The source of `file`. Its errors become `SourceFailed`; errors of the copy stay what they are."""
    try:
        with file.open() as source:
            yield source
    except (ServiceError, _WriteFailed) as error:
        raise (error.reason if isinstance(error, _WriteFailed) else error) from error.__cause__
    except Exception as error:
        raise SourceFailed(file.name) from error


def _write(copy: BinaryIO, chunk: bytes) -> None:
    try:
        copy.write(chunk)
    except OSError as error:
        raise _WriteFailed(error) from error


def _resume(source: BinaryIO, copy: BinaryIO, limit: int) -> tuple["hashlib._Hash", int]:
    """Go to where the copy ends, or to the start of both; digest and number of the bytes that the copy has then."""
    copy.seek(0)
    sha256, size = hashlib.sha256(), 0
    while chunk := copy.read(CHUNK_BYTES):
        sha256.update(chunk)
        size += len(chunk)
    try:
        if 0 < size <= limit:
            source.seek(size)
            return sha256, size
    except (ValueError, NotImplementedError, OSError):
        pass  # a server without ranges
    copy.truncate(0)
    return hashlib.sha256(), 0
