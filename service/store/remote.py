"""A model store by URL. Cards and aliases are copied to a local folder now and then, weights when a model is loaded."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from threading import Lock, Thread
from time import monotonic

import structlog
from typing_extensions import override

from service.errors import (
    CardInvalid,
    ModelLoadFailed,
    ModelNotFound,
    ServiceError,
    StoreCacheFailed,
    StoreNotWritable,
    WeightsUnavailable,
)
from service.files import atomic_write
from service.store.byte_cache import ByteCache, CachedFile, SourceFailed
from service.store.cards import CARD_FILE
from service.store.location import Location, RemoteOptions, is_missing, reason, root_cause
from service.store.names import ALIASES_FILE, VERSION, may_be_model
from service.store.store import Store, StoredModel

log = structlog.get_logger(component="store")

RETRY_SECONDS = 3.0  # until a store that did not answer is tried again
FIRST_SECONDS = 3.0  # that the very first call waits for the store, where an earlier process has left a copy
_COMPLETE = ".listed"  # a file that exists once the whole store has been copied


class RemoteStore(Store):
    """Reads its copy, while a thread brings that up to date; waits for the thread only where there is no copy.

    The very first call of a process waits for a short while, too.
    """

    def __init__(self, options: RemoteOptions) -> None:
        super().__init__(options.folder, partial=True)
        self.location = Location(options.url)
        self._poll_seconds = options.poll_seconds
        self._mirror = _Mirror(self.location, self.root)
        self._cache = ByteCache(options.cache, options.cache_bytes)
        # Mutable state: the sync under way or the last one, when the next is due, and how the last one ended.
        self._lock = Lock()
        self._syncing: Thread | None = None
        self._due = 0.0
        self._failure: ServiceError | None = None
        self._tried = False
        self._began = 0.0  # when the very first sync did

    @property
    def failure(self) -> ServiceError | None:
        """Why the copy is older than it should be; None when it is not."""
        return self._failure

    @override
    def set_alias(self, name: str, target: str) -> None:
        raise self._read_only(f"{name!r} -> {target!r}")

    @override
    def remove_alias(self, name: str) -> None:
        raise self._read_only(repr(name))

    @override
    def close(self) -> None:
        self._cache.close()

    @override
    @contextmanager
    def holding(self, stored: StoredModel) -> Iterator[StoredModel]:
        """The weights and reference images of `stored` are local for as long as the context lasts.

        Raises:
            StoreUnreachable, StoreCacheFailed: they can't be read, or there is no room for them.
            WeightsCorrupt, WeightsDigestMismatch: they are not what the card says.
            CardInvalid: it has none.
        """
        card = stored.require_card()
        files = [self._cached_file(stored, card.weights.file, card.weights.sha256, card.weights.bytes)]
        if card.reference:
            files.insert(0, self._cached_file(stored, card.reference.file, card.reference.sha256, None))
        try:
            with self._cache.holding(stored.folder, files):
                yield stored
        except SourceFailed as error:
            cause = root_cause(error.__cause__ or error)
            if is_missing(cause):
                raise WeightsUnavailable(
                    f"{error}: it is not there, though the card names it; copy it there"
                ) from cause
            unreachable = self.location.unreachable(cause)
            raise type(unreachable)(
                f"{error} can't be read: {reason(cause)}; PVT_MODEL_STORE names the store"
            ) from cause

    def sync(self) -> None:
        """Bring the copy up to date now; where that fails, it stays as it was, and `failure` says why."""
        failure: ServiceError | None = None
        try:
            self._mirror.sync()
        except ServiceError as error:
            failure = error
        except OSError as error:
            failure = StoreCacheFailed(
                f"{self.root}: {error.strerror or error}; PVT_STORE_CACHE_DIR names the folder for copies"
            )
        except Exception as error:
            log.exception("store_sync_failed", store=self.location.name)
            failure = self.location.unreachable(error)
        if str(failure) != str(self._failure):
            if failure:
                log.warning("store_unreachable", store=self.location.name, reason=str(failure))
            else:
                log.info("store_reached", store=self.location.name)
        self._failure = failure
        self._tried = True
        self._due = monotonic() + (min(RETRY_SECONDS, self._poll_seconds) if failure else self._poll_seconds)

    @override
    def _refresh(self) -> None:
        """Start a sync when one is due.

        Raises:
            StoreUnreachable, StoreCacheFailed: there is no copy.
        """
        complete = self._mirror.complete
        with self._lock:
            lost = self._tried and not self._failure and not complete  # the folder was emptied
            if (self._syncing is None or not self._syncing.is_alive()) and (lost or monotonic() >= self._due):
                self._syncing = Thread(target=self.sync, name="pvt-store-sync", daemon=True)
                self._syncing.start()
                self._began = self._began or monotonic()
            syncing = self._syncing
        if syncing and (lost or not self._tried):
            syncing.join(max(0.0, self._began + FIRST_SECONDS - monotonic()) if complete else None)
        if self._failure and not self._mirror.complete:
            raise copy(self._failure)

    @override
    def _read(self, folder: Path) -> list[StoredModel]:
        return [self._explained(model) for model in super()._read(folder)]

    def _explained(self, model: StoredModel) -> StoredModel:
        """`model` with a failure that speaks of the store instead of its copy."""
        if model.failure is None:
            return model
        card = "/".join(filter(None, (model.id, model.version, CARD_FILE)))
        why = self._mirror.problems.get(card)
        if why or not _exists(self.root / card):
            if not why and isinstance(self._failure, StoreCacheFailed):
                why = str(self._failure)
            failure: ModelLoadFailed = CardInvalid(f"{self.location.name}/{card}: {why or 'it is not there'}")
        else:
            failure = type(model.failure)(self._with_url(str(model.failure)))
        return StoredModel(model.id, model.version, model.folder, None, failure)

    @override
    def _missing(self, name: str) -> ModelNotFound | WeightsUnavailable:
        error = super()._missing(name)
        return type(error)(self._with_url(str(error)))

    def _with_url(self, message: str) -> str:
        return message.replace(str(self.root), self.location.name)

    def _cached_file(self, stored: StoredModel, file: str, digest: str, size: int | None) -> CachedFile:
        path = f"{stored.id}/{stored.version}/{file}"
        name = f"{self.location.name}/{path}"
        return CachedFile(stored.folder / file, digest, size, name, lambda: self.location.open(path))

    def _read_only(self, change: str) -> StoreNotWritable:
        return StoreNotWritable(
            f"{change}: the model store {self.location.name!r} is only read from here; change its aliases.json there"
        )


def open_store(folder: Path, remote: RemoteOptions | None) -> Store:
    """The store by URL, where there is one, or that in `folder`."""
    return RemoteStore(remote) if remote else Store(folder)


class _Mirror:
    """Copies the small files of `location` into `folder`, for one thread and any number of processes. Blocking."""

    def __init__(self, location: Location, folder: Path) -> None:
        self.location = location
        self.folder = folder
        # Mutable state: the tag of each file when it was last read, and why the others could not be read or written.
        self._tags: dict[str, str] = {}
        self.problems: Mapping[str, str] = {}

    @property
    def complete(self) -> bool:
        """Whether the store was copied at least once, by this process or an earlier one."""
        return _exists(self.folder / _COMPLETE)

    def sync(self) -> None:
        """Make the folder what the store is now. Where that fails, it stays what it was.

        Raises:
            StoreUnreachable: the store can't be listed.
            OSError: the folder can't be written.
        """
        files = self.location.files()
        folders = {path.rpartition("/")[0] for path in files} - {""}
        small = [path for path in files if path == ALIASES_FILE or path.endswith(f"/{CARD_FILE}")]
        changed = [path for path in small if not (files[path] and self._copied_tag(path) == files[path])]
        contents = self.location.read(changed)
        if changed and all(isinstance(each, Exception) and _is_no_answer(each) for each in contents.values()):
            raise self.location.unreachable(next(e for e in contents.values() if isinstance(e, Exception)))
        self.folder.mkdir(parents=True, exist_ok=True)
        problems = {path: why for path, why in self.problems.items() if path in small and path not in changed}
        for folder in folders:
            with _reporting(problems, f"{folder}/{CARD_FILE}"):
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted(contents, key=lambda path: path == ALIASES_FILE):  # aliases after the models that they name
            self._tags.pop(path, None)
            with _reporting(problems, path):
                self._copy(path, contents[path], files[path], problems)
        self.problems = problems
        self._remove_others(folders, keep_aliases=ALIASES_FILE in files)
        (self.folder / _COMPLETE).touch()

    def _copied_tag(self, path: str) -> str | None:
        """The tag of the copy of `path`; None where it is missing, for the folder may have been emptied."""
        tag = self._tags.get(path)
        return tag if path in self.problems or _exists(self.folder / path) else None

    def _copy(self, path: str, content: bytes | Exception, tag: str, problems: dict[str, str]) -> None:
        if not isinstance(content, Exception):
            self._write(self.folder / path, content)
            self._tags[path] = tag
            return
        problems[path] = reason(content)
        if not _is_no_answer(content):  # while the store does not answer, the old copy stays
            (self.folder / path).unlink(missing_ok=True)

    def _write(self, target: Path, content: bytes) -> None:
        with suppress(OSError):  # a file that can't be read may still be replaced
            if target.read_bytes() == content:
                return
        if target.name == CARD_FILE:  # a new card belongs to other weights
            for other in target.parent.iterdir():
                other.unlink()
        atomic_write(target, content)

    def _remove_others(self, folders: set[str], *, keep_aliases: bool) -> None:
        """Remove what is no longer in the store."""
        if not keep_aliases:
            (self.folder / ALIASES_FILE).unlink(missing_ok=True)
        models = {folder.partition("/")[0] for folder in folders}
        for model in [path for path in self.folder.iterdir() if may_be_model(path)]:
            with suppress(OSError):  # reading the model reports why it can't be looked at
                for version in model.iterdir():
                    if VERSION.fullmatch(version.name) and f"{model.name}/{version.name}" not in folders:
                        shutil.rmtree(version, ignore_errors=True)
            if model.name not in models:
                shutil.rmtree(model, ignore_errors=True)


@contextmanager
def _reporting(problems: dict[str, str], path: str) -> Iterator[None]:
    """Add an error that concerns one file to `problems`; raise one that concerns them all.

    Raises:
        OSError: the disk is full, or can only be read.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            raise
        problems[path] = (
            f"its copy {error.filename or path} can't be written: {error.strerror or error}; "
            "PVT_STORE_CACHE_DIR names the folder for copies"
        )


def _is_no_answer(error: Exception) -> bool:
    """Whether it says that the store does not answer, rather than something of one file."""
    cause = root_cause(error)
    status = getattr(cause, "status", None)
    return not isinstance(cause, FileNotFoundError | PermissionError) and status not in {401, 403, 404, 410}


def _exists(path: Path) -> bool:
    """Whether there is such a file, as far as can be seen."""
    try:
        return path.exists()
    except OSError:
        return False
