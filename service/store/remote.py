"""A model store by URL. Cards and aliases are copied to a local folder now and then, weights when a model is loaded."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from stat import S_ISREG
from threading import Event, Lock, Thread
from time import monotonic, time_ns
from typing import NamedTuple

import structlog
from typing_extensions import override

from service.errors import (
    CardInvalid,
    ModelLoadFailed,
    ServiceError,
    ShuttingDown,
    StoreCacheFailed,
    StoreNotWritable,
    WeightsCorrupt,
    WeightsDigestMismatch,
)
from service.files import atomic_write, file_sha256, locked
from service.store.cards import CARD_FILE, WeightsFile
from service.store.location import DENIED, Location, RemoteOptions, status_of
from service.store.store import ALIASES_FILE, Store, StoredModel

log = structlog.get_logger(component="store")

RETRY_SECONDS = 3.0  # until a store that did not answer is tried again
FIRST_SECONDS = 3.0  # that the very first call waits for the store, where an earlier process has left a copy
LOCK_SECONDS = 0.05  # between two attempts to take a lock that another holds
MAX_UNKNOWN_BYTES = 256_000_000  # of a file whose size is not known: reference images
_COMPLETE = ".listed"  # a file that exists once the whole store has been copied
_CACHE_FOLDER = "PVT_STORE_CACHE_DIR names the folder for copies"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_OF_ONE_FILE = DENIED | {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}  # any other failure is of the whole store


def open_store(folder: Path, remote: RemoteOptions | None) -> Store:
    """The store by URL, where there is one, or that in `folder`."""
    return RemoteStore(remote) if remote else Store(folder)


class RemoteStore(Store):
    """Reads its copy, while a thread brings that up to date; waits for the thread only where there is no copy.

    The very first call of a process waits for a short while, too.
    """

    def __init__(self, options: RemoteOptions) -> None:
        super().__init__(options.folder, partial=True)
        self.location = Location(options.url)
        self._poll_seconds = options.poll_seconds
        self._cache = _WeightsCache(self.location, options)
        # Mutable state: the sync under way or the last one, when the first began, when the next is due (0: there is no
        # copy yet, or none of this process), and why the copy is older than it should be.
        self._lock = Lock()
        self._syncing: Thread | None = None
        self._began = 0.0
        self._due = 0.0
        self.failure: ServiceError | None = None
        # Of the thread: the tag of each file when it was last read, and why the others could not be read or written.
        self._tags: dict[str, str] = {}
        self._problems: dict[str, str] = {}

    @override
    def set_alias(self, name: str, target: str) -> None:
        raise self._read_only(f"{name!r} -> {target!r}")

    @override
    def remove_alias(self, name: str) -> None:
        raise self._read_only(repr(name))

    @override
    def close(self) -> None:
        self._cache.closed.set()

    @override
    @contextmanager
    def holding(self, stored: StoredModel) -> Iterator[StoredModel]:
        """The weights and reference images of `stored` are local for as long as the context lasts.

        Raises:
            CardInvalid, WeightsUnavailable, StoreUnreachable: it has none, or they can't be read.
            WeightsCorrupt, WeightsDigestMismatch: they are not what the card says.
            StoreCacheFailed: there is no room for them, or the folder can't be written.
            ShuttingDown: `close` was called meanwhile; what was downloaded is kept for the next attempt.
        """
        card = stored.require_card()
        files = [
            _File(stored.folder / each.file, each.sha256, each.bytes if isinstance(each, WeightsFile) else None)
            for each in (card.reference, card.weights)
            if each
        ]
        with self._cache.holding(stored.folder, files):
            yield stored

    def sync(self) -> None:
        """Bring the copy up to date now; where that fails, it stays as it was, and `failure` says why."""
        failure: ServiceError | None = None
        try:
            self._copy_store()
        except ServiceError as error:
            failure = error
        except OSError as error:
            failure = _cache_failed(self.root, error)
        except Exception as error:
            log.exception("store_sync_failed", store=self.location.name)
            failure = self.location.unreachable(error)
        if str(failure) != str(self.failure):
            if failure:
                log.warning("store_unreachable", store=self.location.name, reason=str(failure))
            else:
                log.info("store_reached", store=self.location.name)
        self.failure = failure
        self._due = monotonic() + (min(RETRY_SECONDS, self._poll_seconds) if failure else self._poll_seconds)

    @override
    def _refresh(self) -> None:
        """Start a sync when one is due; raises StoreUnreachable or StoreCacheFailed if there is no copy."""
        complete = _exists(self.root / _COMPLETE)
        with self._lock:
            if not complete and not self.failure:  # the folder was emptied
                self._due = 0.0
            if (self._syncing is None or not self._syncing.is_alive()) and monotonic() >= self._due:
                self._syncing = Thread(target=self.sync, name="pvt-store-sync", daemon=True)
                self._syncing.start()
                self._began = self._began or monotonic()
            syncing, waits = self._syncing, self._due == 0
        if syncing and waits:
            syncing.join(max(0.0, self._began + FIRST_SECONDS - monotonic()) if complete else None)
        if self.failure and not _exists(self.root / _COMPLETE):
            raise copy(self.failure)

    @override
    def _read(self, folder: Path) -> list[StoredModel]:
        """The versions in `folder`, with failures that speak of the store instead of its copy."""
        models = super()._read(folder)
        return [replace(each, failure=self._explained(each, each.failure)) if each.failure else each for each in models]

    def _explained(self, model: StoredModel, failure: ModelLoadFailed) -> ModelLoadFailed:
        card = "/".join(filter(None, (model.id, model.version, CARD_FILE)))
        why = self._problems.get(card)
        if not why and _exists(self.root / card):
            return type(failure)(str(failure).replace(str(self.root), self.location.name))
        if not why and isinstance(self.failure, StoreCacheFailed):
            why = str(self.failure)
        return CardInvalid(f"{self.location.name}/{card}: {why or 'it is not there'}")

    def _read_only(self, change: str) -> StoreNotWritable:
        return StoreNotWritable(
            f"{change}: the model store {self.location.name!r} is only read from here; change its aliases.json there"
        )

    def _copy_store(self) -> None:
        """Make the folder what the store is now; raises StoreUnreachable, or OSError if it can't be written."""
        files = self.location.files()
        folders = {path.rpartition("/")[0] for path in files} - {""}
        small = [path for path in files if path == ALIASES_FILE or path.endswith(f"/{CARD_FILE}")]
        same = {each for each in small if files[each] == self._tags.get(each) != "" and _exists(self.root / each)}
        contents = self.location.read([path for path in small if path not in same])
        errors = [each for each in contents.values() if isinstance(each, Exception)]
        if errors and len(errors) == len(small) and not any(status_of(error) in _OF_ONE_FILE for error in errors):
            raise self.location.unreachable(errors[0])
        self.root.mkdir(parents=True, exist_ok=True)
        problems: dict[str, str] = {}
        cards = {f"{folder}/{CARD_FILE}" for folder in folders}
        for path in sorted(cards | {*contents}, key=lambda path: path == ALIASES_FILE):  # aliases after their models
            try:
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                if path in contents:
                    self._copy(path, contents[path], files[path], problems)
            except OSError as error:
                if error.errno in {*_FULL, errno.EROFS}:  # concerns all files
                    raise
                problems[path] = (
                    f"its copy {error.filename or path} can't be written: {error.strerror or error}; {_CACHE_FOLDER}"
                )
        self._problems = problems
        if ALIASES_FILE not in files:
            (self.root / ALIASES_FILE).unlink(missing_ok=True)
        present = folders | {folder.partition("/")[0] for folder in folders}
        for copied in (*self.root.glob("*/*"), *self.root.glob("*")):
            if copied.relative_to(self.root).as_posix() not in present:
                shutil.rmtree(copied, ignore_errors=True)  # which leaves files
        (self.root / _COMPLETE).touch()

    def _copy(self, path: str, content: bytes | Exception, tag: str, problems: dict[str, str]) -> None:
        target = self.root / path
        self._tags.pop(path, None)
        if isinstance(content, Exception):
            problems[path] = self.location.reason(content)
            if status_of(content) in _OF_ONE_FILE:  # while the store does not answer, the old copy stays
                target.unlink(missing_ok=True)
            return
        with suppress(OSError):  # a file that can't be read may still be replaced
            if target.read_bytes() == content:
                self._tags[path] = tag
                return
        if target.name == CARD_FILE:  # a new card belongs to other weights
            for other in target.parent.iterdir():
                other.unlink()
        atomic_write(target, content)
        self._tags[path] = tag


def _exists(path: Path) -> bool:
    """Whether there is such a file, as far as can be seen."""
    try:
        return path.exists()
    except OSError:
        return False


def _cache_failed(folder: Path, error: OSError) -> StoreCacheFailed:
    return StoreCacheFailed(f"{folder}: {error.strerror or error}; {_CACHE_FOLDER}")


class _File(NamedTuple):
    """A file of a version: the path of its copy, its SHA-256, and its size if that is known."""

    path: Path
    sha256: str
    bytes: int | None

    @property
    def source(self) -> str:
        """Where it is below the store's root: <model>/<version>/<file>."""
        return "/".join(self.path.parts[-3:])

    def is_whole(self) -> bool:
        """Whether the copy has the right bytes; if so, it counts as used now."""
        try:
            stat = self.path.stat()
            if self.bytes not in {None, stat.st_size} or file_sha256(self.path) != self.sha256:
                return False
        except OSError:  # fetching the file again shows what is wrong, if more is than that it is missing
            return False
        with suppress(OSError):  # a folder that can only be read
            os.utime(self.path, ns=(time_ns(), stat.st_mtime_ns))
        return True


class _WeightsCache:
    """Copies of weights and reference images, in a folder of limited size that several threads and processes share.

    Each version has a lock, which its readers share, and so has the cache. Copies in use are never removed.
    """

    def __init__(self, location: Location, options: RemoteOptions) -> None:
        self._location = location
        self._root = options.cache
        self._limit = options.cache_bytes
        self.closed = Event()  # which ends downloads and waiting

    @contextmanager
    def holding(self, folder: Path, files: list[_File]) -> Iterator[None]:
        """All `files` of the version in `folder` are present and whole for as long as the context lasts."""
        with self._locked(lock_of(folder), shared=True):
            if not all(file.is_whole() for file in files):
                with self._locked(self._root / ".lock"):  # one at a time, since they need the same room
                    for file in files:
                        if not file.is_whole():
                            self._fetch(file)
            yield

    @contextmanager
    def _locked(self, path: Path, *, shared: bool = False) -> Iterator[None]:
        with ExitStack() as lock:
            while True:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    lock.enter_context(locked(path, shared=shared, wait=False))
                    break
                except BlockingIOError:
                    if self.closed.wait(LOCK_SECONDS):
                        raise ShuttingDown("the service is shutting down") from None
                except OSError as error:
                    raise _cache_failed(self._root, error) from error
            yield

    def _fetch(self, file: _File) -> None:
        part = file.path.with_name(f".{file.sha256[:16]}.part")
        try:
            file.path.unlink(missing_ok=True)
            file.path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(file, part)
            sha256, size = self._download(file, part)
            if sha256 == file.sha256:
                part.replace(file.path)
                log.info("weights_fetched", file=f"{self._location.name}/{file.source}", bytes=size)
                return
            part.unlink()
        except OSError as error:
            if error.errno in _FULL:
                part.unlink(missing_ok=True)
            raise _cache_failed(self._root, error) from error
        name = f"{self._location.name}/{file.source}"
        if file.bytes is not None and size != file.bytes:
            fault = f"truncated: {size}" if size < file.bytes else "too long: more than"
            raise WeightsCorrupt(f"{name}: {fault} bytes, the card says {file.bytes}; copy the file again")
        raise WeightsDigestMismatch(f"{name}: SHA-256 is {sha256}, the card says {file.sha256}")

    def _download(self, file: _File, part: Path) -> tuple[str, int]:
        """SHA-256 and size of what `part` holds then; a download goes on where an earlier attempt ended."""
        with part.open("ab+") as copied:
            copied.seek(0)
            sha256, size = hashlib.file_digest(copied, "sha256"), copied.tell()
            for offset, chunk in self._location.chunks(file.source, size):
                if self.closed.is_set():
                    raise ShuttingDown("the service is shutting down")
                if offset == 0:
                    copied.truncate(0)
                    sha256 = hashlib.sha256()
                copied.write(chunk)
                sha256.update(chunk)
                size = offset + len(chunk)
                if size > (MAX_UNKNOWN_BYTES if file.bytes is None else file.bytes):
                    break
            copied.flush()
            os.fsync(copied.fileno())
        return sha256.hexdigest(), size

    def _make_room(self, file: _File, part: Path) -> None:
        """Remove the least recently used files until `file` fits; raises StoreCacheFailed if it does not."""
        needed, name = file.bytes or 0, f"{self._location.name}/{file.source}"
        if needed > self._limit:
            raise StoreCacheFailed(
                f"{name} has {needed} bytes, more than the {self._limit} of PVT_STORE_CACHE_MB; raise it"
            )
        files: dict[Path, os.stat_result] = {}
        for path in self._root.glob("*/*/*/*"):
            with suppress(OSError):  # what can't be looked at can't be removed either
                if path not in {part, path.with_name(CARD_FILE)} and S_ISREG((stat := path.stat()).st_mode):
                    files[path] = stat
        excess = sum(stat.st_size for stat in files.values()) + needed - self._limit
        for path in sorted(files, key=lambda path: files[path].st_atime_ns):
            if excess <= 0:
                return
            with suppress(BlockingIOError), locked(lock_of(path.parent), wait=False):
                path.unlink(missing_ok=True)
                excess -= (size := files[path].st_size)
                log.info("weights_evicted", file=str(path.relative_to(self._root)), bytes=size)
        if excess > 0:
            raise StoreCacheFailed(
                f"no room for {name}: {excess} bytes too many while models are being loaded; "
                "ask again, or raise PVT_STORE_CACHE_MB"
            )


def lock_of(folder: Path) -> Path:
    """The file whose lock is held while the files of the version in `folder` are in use."""
    return folder.with_name(f".{folder.name}.lock")
