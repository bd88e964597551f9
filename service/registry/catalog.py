"""What models there are and where each stands: in the store, in memory, or published and yet to be pulled."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from service.acquisition.pulling import Pulls
from service.errors import ServiceError, WeightsUnavailable
from service.options import EngineOptions
from service.registry.entries import Candidate, EntryStatus
from service.registry.registry import Registry
from service.registry.resident import Resident
from service.registry.status import ModelStatus, VersionStatus
from service.sharing import fresh
from service.store.remote import open_store
from service.store.store import Contents, StoredModel
from service.workers import Workers, detached

FETCHES = 4  # at a time; they wait for one another's room in the cache, but not for one that has its files


class Catalog:
    """Finds every model that could be loaded, and fetches its files to this machine. It lives until it is closed.

    A `registry.Finder`. `folder` is where to watch for changes, if that can be watched.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.folder: Path = options.model_store
        self._default_model = options.default_model
        self.pulls = Pulls(options)
        self.store = open_store(options.model_store, options.remote_store)
        self.thread = Workers("store", 1)  # calls the store's methods
        # Not the store's thread: downloads take minutes, and are no stall.
        self._fetching = Workers("fetch", FETCHES)

    def close(self) -> None:
        """Give up what is under way."""
        self.pulls.close()
        self.store.close()
        for workers in (self.thread, self._fetching):
            workers.close(wait=False)

    async def find(self, name: str) -> Sequence[Candidate]:
        """The versions in the store that `name` may stand for, the best first; at least one.

        Raises:
            ModelNotFound, WeightsUnavailable, AliasesInvalid: there is none.
        """
        return await self.thread.run(lambda: [_candidate(stored) for stored in self.store.candidates(name)])

    async def obtain(self, name: str, max_wait_seconds: float | None = None) -> Sequence[Candidate]:
        """The same, after pulling the published weights that `name` means, if they are not in the store.

        Raises:
            ModelNotFound, WeightsUnavailable, AliasesInvalid: there is none.
            WeightsUnavailable, WeightsInvalid, StoreNotWritable, ModelLoading: see `Pulls.pull`.
        """
        published = self.pulls.wanted(name)
        try:
            found = await self.find(name)
            if published is None or found[0].stored.version:  # a pull that was killed may leave a folder without one
                return found
        except WeightsUnavailable:
            # Detached, since the threads that pull may all be busy for long.
            if published is None or not await detached(self._has_folder):
                raise
        await self.pulls.pull(published, max_wait_seconds)
        return await self.find(name)

    def _has_folder(self) -> bool:
        try:
            return self.folder.is_dir()
        except OSError:  # a folder around it can't be entered
            return False

    @asynccontextmanager
    async def fetched(self, stored: StoredModel) -> AsyncIterator[StoredModel]:
        """The same model with all its files in a folder of this machine, for as long as the context lasts.

        Raises:
            WeightsUnavailable, ModelLoadFailed: they can't be fetched, or are not what they should be.
        """
        held = ExitStack()
        fetching = asyncio.ensure_future(self._fetching.run(held.enter_context, self.store.holding(stored)))

        def release(done: "asyncio.Future[StoredModel]") -> None:
            held.close()
            _ = done.cancelled() or done.exception()  # retrieved, should the caller have gone

        try:
            yield await asyncio.shield(fetching)
        finally:
            fetching.add_done_callback(release)

    async def models(self, registry: Registry[Resident]) -> list[ModelStatus]:
        """Every model of the store, and every other that is loaded in `registry`.

        Raises:
            WeightsUnavailable: the store can't be read, and nothing is loaded.
        """
        try:
            contents = await self.thread.run(self.store.contents)
        except WeightsUnavailable:
            if not registry.loaded():
                raise
            contents = Contents({}, {})
        default = await self._default_id(registry)
        ids = {*contents.versions} | {each.stored.id for each in registry.all() if not each.failure}
        all_versions = {id_: _versions(id_, contents, registry) for id_ in sorted(ids)}
        return [
            _model(_answering(id_, versions, registry), versions, contents, default=id_ == default)
            for id_, versions in all_versions.items()
        ]

    async def model(self, name: str, registry: Registry[Resident]) -> ModelStatus:
        """The model called `name`; by name and version, or by an alias, in that version.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has none.
        """
        named = registry.named(name)
        found = [named.stored] if named else [each.stored for each in await self.find(name)]
        try:
            contents = await self.thread.run(self.store.contents)
        except WeightsUnavailable:
            # A folder that can't be listed, though what is named in it can be read.
            contents = Contents({found[0].id: found}, {})
        default, id_ = await self._default_id(registry), found[0].id
        versions = _versions(id_, contents, registry)
        answering = _answering(id_, versions, registry)
        if answering not in {each.key for each in found}:
            answering = found[0].key
            versions = {answering: (found[0], None), **versions}
        return _model(answering, versions, contents, default=id_ == default)

    async def _default_id(self, registry: Registry[Resident]) -> str | None:
        if named := registry.named(self._default_model):
            return named.stored.id
        try:
            return (await self.find(self._default_model))[0].stored.id
        except ServiceError:
            return None


_Versions = Mapping[str, tuple[StoredModel, EntryStatus[Resident] | None]]


def _model(answering: str, versions: _Versions, contents: Contents, *, default: bool) -> ModelStatus:
    """The model in the version `answering`."""
    stored, entry = versions[answering]
    return ModelStatus(
        id=stored.id,
        version=stored.version,
        **_state(stored, entry),
        aliases=contents.aliases_of(stored.id),
        default=default,
        card=stored.card,
        versions=[
            VersionStatus(id=each.id, version=each.version, **_state(each, status), aliases=contents.aliases_of(key))
            for key, (each, status) in versions.items()
        ],
        **(_loaded(entry.loaded) if entry and entry.loaded else {}),
    )


def _versions(id_: str, contents: Contents, registry: Registry[Resident]) -> _Versions:
    """By key: what is in memory counts, whatever has become of its folder since."""
    found: dict[str, tuple[StoredModel, EntryStatus[Resident] | None]] = {
        stored.key: (stored, None) for stored in contents.versions.get(id_, ())
    }
    for entry in registry.all():
        if entry.stored.id == id_ and not (entry.failure and entry.stored.key not in found):
            found[entry.stored.key] = (entry.stored, entry)
    return found


def _answering(id_: str, versions: _Versions, registry: Registry[Resident]) -> str:
    """The version that answers to the model's name; else the newest that may, else the newest."""
    if (named := registry.named(id_)) and named.stored.key in versions:
        return named.stored.key
    whole = (key for key, (stored, entry) in versions.items() if not (stored.failure or (entry and entry.failure)))
    return next(whole, next(iter(versions), ""))


def _state(stored: StoredModel, entry: EntryStatus[Resident] | None) -> dict[str, Any]:
    failure = (entry and entry.failure) or stored.failure
    if entry is None or failure:
        return {"state": "failed" if failure else "available", "failure": failure and fresh(failure)}
    return {
        "state": entry.state,
        "leases": entry.leases,
        "pinned": entry.pinned,
        "idle_seconds": entry.idle_seconds,
        "memory_bytes": entry.memory_bytes,
    }


def _loaded(resident: Resident) -> dict[str, Any]:
    executable, report = resident.executable, resident.executable.report
    return {
        "backend": report.backend,
        "device": report.device,
        "precision": report.precision,
        "layout": report.layout,
        "plan": executable.plan.seconds,
        "alone_seconds": executable.plan.alone_seconds,
        "plan_cached": report.cached,
        "notes": resident.notes,
        "load_seconds": report.load_seconds,
        "optimizing": executable.optimizer is not None,
        "deviation": report.deviation,
        "other_precisions": {n: each for n, each in executable.precisions.items() if each != report.precision},
    }


def _candidate(stored: StoredModel) -> Candidate:
    """A card has the digests of all its files in it, so the same card is the same model."""
    card = sha256(stored.card.model_dump_json().encode()).hexdigest()[:16] if stored.card else ""
    try:
        files = [(path.name, path.stat()) for path in sorted(stored.folder.iterdir())]
    except OSError:
        files = []  # it has none on this machine
    mark = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
    return Candidate(stored, f"{stored.key}#{card}", mark)
