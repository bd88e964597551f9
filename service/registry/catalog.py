"""What models there are and where each stands: in the store, in memory, or published and yet to be pulled."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import structlog
from watchfiles import awatch

from service.acquisition.pulling import Pulls
from service.errors import ServiceError, WeightsUnavailable
from service.options import EngineOptions
from service.registry.registry import Registry
from service.registry.resident import Resident
from service.registry.versions import Candidate, ModelStatus, VersionStatus
from service.sharing import fresh
from service.store.remote import open_store
from service.store.store import Contents, StoredModel
from service.workers import Workers, detached

log = structlog.get_logger(component="catalog")

FETCHES = 4  # at a time; they wait for one another's room in the cache, but not for one that has its files
DEBOUNCE_MS = 1000  # changes are gathered for so long at the most,
QUIET_MS = 200  # or until there have been none for so long


class Catalog:
    """A `Finder` of every model that could be loaded; fetches its files to this machine. It lives until it is closed.

    `folder` is where to watch for changes.
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
        """The versions in the store that `name` may stand for, the best first; raises as `Store.candidates`."""
        return await self.thread.run(lambda: [_candidate(stored) for stored in self.store.candidates(name)])

    async def obtain(self, name: str, max_wait_seconds: float | None = None) -> Sequence[Candidate]:
        """The same, after pulling the published weights that `name` means, if need be; raises as `Pulls.pull`, too."""
        published = self.pulls.wanted(name)
        try:
            found = await self.find(name)
            if published is None or found[0].stored.version:  # a pull that was killed may leave a folder without one
                return found
        except WeightsUnavailable:
            # Detached, since the threads that pull may all be busy for long.
            if published is None or not await detached(partial(os.path.isdir, self.folder)):
                raise
        await self.pulls.pull(published, max_wait_seconds)
        return await self.find(name)

    @asynccontextmanager
    async def fetched(self, stored: StoredModel) -> AsyncIterator[StoredModel]:
        """The same model with all its files in a folder of this machine, for as long as the context lasts.

        Raises:
            WeightsUnavailable, ModelLoadFailed: they can't be fetched, or are not what they should be.
        """
        files = ExitStack()
        fetching = asyncio.ensure_future(self._fetching.run(files.enter_context, self.store.holding(stored)))

        def release(done: "asyncio.Future[StoredModel]") -> None:
            files.close()
            _ = done.cancelled() or done.exception()  # retrieved, should the caller have gone

        try:
            yield await asyncio.shield(fetching)
        finally:
            fetching.add_done_callback(release)

    async def models(self, registry: Registry[Resident]) -> list[ModelStatus]:
        """Every model of the store or in `registry`; raises WeightsUnavailable where neither can be had."""
        try:
            contents = await self.thread.run(self.store.contents)
        except WeightsUnavailable:
            if not registry.loaded():
                raise
            contents = Contents({}, {})
        default = await self._default_id(registry)
        ids = {*contents.versions} | {each.id for each in registry.all() if not each.failure}
        return [_model(id_, contents, registry, default) for id_ in sorted(ids)]

    async def model(self, name: str, registry: Registry[Resident]) -> ModelStatus:
        """The model called `name`; by name and version, or by an alias, in that version. Raises as `find`."""
        named = registry.named(name)
        found = [named.stored] if named else [each.stored for each in await self.find(name)]
        try:
            contents = await self.thread.run(self.store.contents)
        except WeightsUnavailable:
            # A folder that can't be listed, though what is named in it can be read.
            contents = Contents({found[0].id: found}, {})
        return _model(found[0].id, contents, registry, await self._default_id(registry), found)

    async def _default_id(self, registry: Registry[Resident]) -> str | None:
        if named := registry.named(self._default_model):
            return named.id
        try:
            return (await self.find(self._default_model))[0].stored.id
        except ServiceError:
            return None


def _model(
    id_: str, contents: Contents, registry: Registry[Resident], default: str | None, found: Sequence[StoredModel] = ()
) -> ModelStatus:
    """The model in the version that answers to its name, or else in the newest that may; if `found`, in one of these.

    What is in memory counts, whatever has become of its folder since.
    """
    versions = {stored.key: _in_store(stored, contents) for stored in contents.versions.get(id_, ())}
    for status in registry.all():
        key = status.stored.key
        if status.id == id_ and (key in versions or not status.failure):
            versions[key] = replace(status, aliases=contents.aliases_of(key))
    answering = next((key for key, each in versions.items() if not each.failure), next(iter(versions), ""))
    if (named := registry.named(id_)) and named.stored.key in versions:
        answering = named.stored.key
    if found and answering not in {each.key for each in found}:
        answering = found[0].key
        versions = {answering: _in_store(found[0], contents), **versions}
    model = ModelStatus(
        **{**vars(versions[answering]), "aliases": contents.aliases_of(id_)},
        default=id_ == default,
        versions=[*versions.values()],
    )
    for resident in registry.loaded():
        executable, report = resident.executable, resident.executable.report
        if executable.stored.key == answering:
            others = {n: each for n, each in executable.precisions.items() if each != report.precision}
            optimizing, notes = executable.optimizer is not None, resident.notes
            return replace(model, report=report, plan=executable.plan, notes=notes, optimizing=optimizing,
                           other_precisions=others)  # fmt: skip
    return model


def _in_store(stored: StoredModel, contents: Contents) -> VersionStatus:
    failure = stored.failure and fresh(stored.failure)
    state: Literal["available", "failed"] = "failed" if failure else "available"
    return VersionStatus(stored=stored, state=state, failure=failure, aliases=contents.aliases_of(stored.key))


def _candidate(stored: StoredModel) -> Candidate:
    """A card has the digests of all its files in it, so the same card is the same model."""
    card = sha256(stored.card.model_dump_json().encode()).hexdigest()[:16] if stored.card else ""
    try:
        files = [(path.name, path.stat()) for path in sorted(stored.folder.iterdir())]
    except OSError:
        files = []  # it has none on this machine
    mark = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
    return Candidate(stored, f"{stored.key}#{card}", mark)


async def watch(folder: Path, seconds: float, refresh: Callable[[], Awaitable[None]]) -> None:
    """Call `refresh` when something below `folder` has changed, and every `seconds` besides, until cancelled.

    The kernel reports changes on local disks only, and a folder that was replaced or mounted over is another one. Where
    the folder can't be watched, it is looked for again later.
    """
    reason: str | None = None
    while True:
        try:
            watched = await asyncio.to_thread(folder.stat)
            batches = awatch(folder, watch_filter=None, debounce=DEBOUNCE_MS, step=QUIET_MS,
                             rust_timeout=max(1, int(1000 * seconds)), yield_on_timeout=True)  # fmt: skip
            async with aclosing(batches):
                async for _ in batches:
                    reason = None
                    await _logged(refresh)
                    if not os.path.samestat(watched, await asyncio.to_thread(folder.stat)):
                        break
        except (OSError, RuntimeError) as error:
            if reason != str(error):
                log.warning("store_not_watched", folder=str(folder), reason=str(error), looked_at_every=seconds)
            reason = str(error)
            await asyncio.sleep(seconds)
        await _logged(refresh)


async def _logged(refresh: Callable[[], Awaitable[None]]) -> None:
    try:
        await refresh()
    except Exception:
        log.exception("refresh_failed")
