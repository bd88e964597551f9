"""A model store by URL. What it says of its models is copied here now and then, weights when a model is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from threading import Lock, Thread
from time import monotonic

import structlog

from service.errors import (
    CardInvalid,
    ModelLoadFailed,
    ModelNotFound,
    ServiceError,
    StoreCacheFailed,
    StoreNotWritable,
    WeightsUnavailable,
)
from service.store.byte_cache import ByteCache, SourceFailed, Wanted
from service.store.cards import CARD_FILE
from service.store.locations import Location, is_not_there, reason, root
from service.store.mirror import Mirror, is_there
from service.store.store import Contents, Store, StoredModel
from service.store.urls import RemoteOptions

log = structlog.get_logger(component="store")

AGAIN_SECONDS = 3.0  # until a store that did not answer is asked again
FIRST_SECONDS = 3.0  # for the very first attempt, where there is a copy of an earlier process to answer from


class RemoteStore(Store):
    """Answers from its copy at once, while a thread brings that up to date; only where there is none it waits for that.

    The very first answer of a process waits a little, too.
    """

    def __init__(self, options: RemoteOptions) -> None:
        super().__init__(options.folder, partial=True)
        self.location = Location(options.url)
        self._poll_seconds = options.poll_seconds
        self._mirror = Mirror(self.location, self.root)
        self._cache = ByteCache(options.cache, options.cache_bytes)
        # Mutable state: the attempt under way or the last one, when the next is due, and what the last one met.
        self._lock = Lock()
        self._syncing: Thread | None = None
        self._due = 0.0
        self._failure: ServiceError | None = None
        self._tried = False
        self._began = 0.0  # when the very first attempt did

    @property
    def failure(self) -> ServiceError | None:
        """Why the copy is older than it should be; None when it is not."""
        return self._failure

    def models(self) -> list[StoredModel]:
        """See `Store.models`."""
        self._fresh()
        return super().models()

    def contents(self) -> Contents:
        """See `Store.contents`."""
        self._fresh()
        return super().contents()

    def versions(self, id_: str) -> list[StoredModel]:
        """See `Store.versions`."""
        self._fresh()
        return super().versions(id_)

    def candidates(self, name: str) -> list[StoredModel]:
        """See `Store.candidates`."""
        self._fresh()
        return super().candidates(name)

    def aliases(self) -> dict[str, str]:
        """See `Store.aliases`."""
        self._fresh()
        return super().aliases()

    def set_alias(self, name: str, target: str) -> None:
        """Refused: a store by URL is only read."""
        raise self._not_written(f"{name!r} -> {target!r}")

    def remove_alias(self, name: str) -> None:
        """Refused, likewise."""
        raise self._not_written(repr(name))

    def close(self) -> None:
        """Give up downloads under way."""
        self._cache.close()

    @contextmanager
    def holding(self, stored: StoredModel) -> Iterator[StoredModel]:
        """The weights and reference pictures of `stored` are here for as long as the context lasts.

        Raises:
            StoreUnreachable, StoreCacheFailed: they can't be had, or there is no room for them.
            WeightsCorrupt, WeightsDigestMismatch: they are not what the card says.
            CardInvalid: it has none.
        """
        card = stored.require_card()
        reference = [(card.reference.file, card.reference.sha256, None)] if card.reference else []
        names = [*reference, (card.weights.file, card.weights.sha256, card.weights.bytes)]
        files = [self._wanted(stored, *name) for name in names]
        try:
            with self._cache.holding(stored.folder, files):
                yield stored
        except SourceFailed as error:
            cause = root(error.__cause__ or error)
            if is_not_there(cause):
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
            log.exception("store_sync_failed", store=self.location.shown)
            failure = self.location.unreachable(error)
        if str(failure) != str(self._failure):
            if failure:
                log.warning("store_unreachable", store=self.location.shown, reason=str(failure))
            else:
                log.info("store_reached", store=self.location.shown)
        self._failure = failure
        self._tried = True
        self._due = monotonic() + (min(AGAIN_SECONDS, self._poll_seconds) if failure else self._poll_seconds)

    def _fresh(self) -> None:
        """See to it that the copy is being brought up to date when due.

        Raises:
            StoreUnreachable, StoreCacheFailed: there is none.
        """
        complete = self._mirror.complete
        with self._lock:
            lost = self._tried and not self._failure and not complete  # somebody has emptied the folder
            if (self._syncing is None or not self._syncing.is_alive()) and (lost or monotonic() >= self._due):
                self._syncing = Thread(target=self.sync, name="pvt-store-sync", daemon=True)
                self._syncing.start()
                self._began = self._began or monotonic()
            syncing = self._syncing
        if syncing and (lost or not self._tried):
            syncing.join(max(0.0, self._began + FIRST_SECONDS - monotonic()) if complete else None)
        if self._failure and not self._mirror.complete:
            raise copy(self._failure)

    def _read(self, folder: Path) -> list[StoredModel]:
        return [self._told(model) for model in super()._read(folder)]

    def _told(self, model: StoredModel) -> StoredModel:
        """What is wrong with it, in terms of the store and not of the copy."""
        if model.failure is None:
            return model
        card = "/".join(filter(None, (model.id, model.version, CARD_FILE)))
        why = self._mirror.problems.get(card)
        if why or not is_there(self.root / card):
            if not why and isinstance(self._failure, StoreCacheFailed):
                why = str(self._failure)
            failure: ModelLoadFailed = CardInvalid(f"{self.location.shown}/{card}: {why or 'it is not there'}")
        else:
            failure = type(model.failure)(self._named(str(model.failure)))
        return StoredModel(model.id, model.version, model.folder, None, failure)

    def _missing(self, name: str) -> ModelNotFound | WeightsUnavailable:
        error = super()._missing(name)
        return type(error)(self._named(str(error)))

    def _named(self, message: str) -> str:
        return message.replace(str(self.root), self.location.shown)

    def _wanted(self, stored: StoredModel, file: str, digest: str, size: int | None) -> Wanted:
        path = f"{stored.id}/{stored.version}/{file}"
        shown = f"{self.location.shown}/{path}"
        return Wanted(stored.folder / file, digest, size, shown, lambda: self.location.open(path))

    def _not_written(self, what: str) -> StoreNotWritable:
        return StoreNotWritable(
            f"{what}: the model store {self.location.shown!r} is only read from here; change its aliases.json there"
        )


def open_store(folder: Path, remote: RemoteOptions | None) -> Store:
    """The store by URL, where there is one, or that in `folder`."""
    return RemoteStore(remote) if remote else Store(folder)
