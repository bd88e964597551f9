"""Files brought here from elsewhere, within a number of bytes, by several threads and processes.

Locks are the kernel's (`flock`), since they are shared by readers and end with their process, whatever ends it.
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
from service.store.cards import CARD_FILE

log = structlog.get_logger(component="store")

PIECE_BYTES = 1 << 20
LOCK_SECONDS = 0.05  # between two looks at a lock that another holds
MAX_UNKNOWN_BYTES = 256_000_000  # of a file whose size nobody said: reference pictures
_LOCKS = ".locks"
_PART = ".part"


class SourceFailed(Exception):
    """A file could not be read where it comes from; the cause is why."""


class _WriteFailed(Exception):
    def __init__(self, reason: OSError) -> None:
        super().__init__()
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file: where it is to lie, its SHA-256, what messages call it, and how to read it.

    `bytes` is its size, None where nobody said.
    """

    path: Path
    sha256: str
    bytes: int | None
    shown: str
    open: Callable[[], BinaryIO]


class ByteCache:
    """The files under `root`, `limit` bytes at the most; those in use are never removed."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self.limit = limit
        self._closed = Event()

    def close(self) -> None:
        """Give up what is under way; what came already is kept for the next time."""
        self._closed.set()

    @contextmanager
    def holding(self, folder: Path, files: list[Wanted]) -> Iterator[None]:
        """All `files`, which lie in `folder`, are there and whole, for as long as the context lasts.

        Raises:
            WeightsCorrupt, WeightsDigestMismatch: what came is not what was wanted.
            StoreCacheFailed: no room, or the folder can't be written.
            ShuttingDown: `close` was called meanwhile.
            SourceFailed: what `open` gave could not be read.
        """
        with self._locked(self._key(folder), fcntl.LOCK_SH):
            if not all(_is_whole(file) for file in files):
                with self._locked("cache", fcntl.LOCK_EX):  # one at a time, so that nobody counts on another's room
                    for file in files:
                        if not _is_whole(file):
                            self._bring(file)
            yield

    def _bring(self, file: Wanted) -> None:
        """Download `file`; what an earlier attempt left is gone on from."""
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

    def _download(self, file: Wanted, part: Path) -> None:
        limit = MAX_UNKNOWN_BYTES if file.bytes is None else file.bytes
        with part.open("ab+") as to:
            with _source(file) as source:
                sha256, done = _resumed(source, to, limit)
                while done <= limit and (piece := source.read(PIECE_BYTES)):
                    if self._closed.is_set():
                        raise ShuttingDown("the service is shutting down")
                    _written(to, piece)
                    sha256.update(piece)
                    done += len(piece)
            to.flush()
            os.fsync(to.fileno())
        if sha256.hexdigest() == file.sha256:
            part.replace(file.path)
            log.info("weights_fetched", file=file.shown, bytes=done)
            return
        part.unlink()
        if file.bytes is not None and done != file.bytes:
            said = f"truncated: {done}" if done < file.bytes else "too long: more than"
            raise WeightsCorrupt(f"{file.shown}: {said} bytes, the card says {file.bytes}; copy the file again")
        raise WeightsDigestMismatch(f"{file.shown}: SHA-256 is {sha256.hexdigest()}, the card says {file.sha256}")

    def _make_room(self, file: Wanted, part: Path) -> None:
        """Remove the files longest unused, until `file` fits.

        Raises:
            StoreCacheFailed: it never does, or not while others are in use.
        """
        needed = file.bytes or 0
        if needed > self.limit:
            raise StoreCacheFailed(
                f"{file.shown} has {needed} bytes, more than the {self.limit} of PVT_STORE_CACHE_MB; raise it"
            )
        held = sorted(((path, there) for path, there in self._files() if path != part), key=lambda f: f[1].st_atime_ns)
        excess = sum(there.st_size for _, there in held) + needed - self.limit
        for path, there in held:
            if excess <= 0:
                return
            with suppress(BlockingIOError), self._locked(self._key(path.parent), fcntl.LOCK_EX, wait=False):
                path.unlink(missing_ok=True)
                log.info("weights_evicted", file=str(path.relative_to(self.root)), bytes=there.st_size)
                excess -= there.st_size
        if excess > 0:
            raise StoreCacheFailed(
                f"no room for {file.shown}: {excess} bytes too many while models are being loaded; "
                "ask again, or raise PVT_STORE_CACHE_MB"
            )

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """What counts: all but cards, aliases and locks. What can't be looked at can't be removed either."""
        for path in self.root.glob("*/*/*/*"):
            with suppress(OSError):
                there = path.stat()
                if path.name != CARD_FILE and S_ISREG(there.st_mode):
                    yield path, there

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


def _is_whole(file: Wanted) -> bool:
    """Whether it is there with the right bytes; if so, it counts as used now."""
    try:
        there = file.path.stat()
        if file.bytes not in {None, there.st_size}:
            return False
        with file.path.open("rb") as opened:
            whole = hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
    except OSError:  # fetching it anew tells what is wrong, if more is than that it is not there
        return False
    with suppress(OSError):  # a folder that can only be read
        os.utime(file.path, ns=(time_ns(), there.st_mtime_ns))
    return whole


@contextmanager
def _source(file: Wanted) -> Iterator[BinaryIO]:
    """The file elsewhere; what goes wrong with it is `SourceFailed`, what goes wrong here is not."""
    try:
        with file.open() as source:
            yield source
    except (ServiceError, _WriteFailed) as error:
        raise (error.reason if isinstance(error, _WriteFailed) else error) from error.__cause__
    except Exception as error:
        raise SourceFailed(file.shown) from error


def _written(to: BinaryIO, piece: bytes) -> None:
    try:
        to.write(piece)
    except OSError as error:
        raise _WriteFailed(error) from error


def _resumed(source: BinaryIO, to: BinaryIO, limit: int) -> tuple["hashlib._Hash", int]:
    """Go to where the part ends, or to the start of both; the digest and the number of the bytes that are there."""
    to.seek(0)
    sha256, done = hashlib.sha256(), 0
    while piece := to.read(PIECE_BYTES):
        sha256.update(piece)
        done += len(piece)
    try:
        if 0 < done <= limit:
            source.seek(done)
            return sha256, done
    except (ValueError, NotImplementedError, OSError):
        pass  # a server without ranges
    to.truncate(0)
    return hashlib.sha256(), 0
