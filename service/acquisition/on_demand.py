"""Published weights fetched into the store by the first request for them."""

import asyncio
from collections.abc import Awaitable, Callable, Container, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from time import monotonic
from typing import Literal

import structlog

from service.acquisition.catalogue import CATALOGUE, Published, published
from service.acquisition.pulling import Pulled, PullOptions, pull
from service.errors import ModelLoading, ModelNotFound, ServiceError, WeightsUnavailable
from service.machine.workers import Workers, detached
from service.options import EngineOptions
from service.store.stored import StoredModel

log = structlog.get_logger(component="on_demand")

PULLS = 2  # at a time
FAILURE_SECONDS = 30.0  # how long what went wrong is told without trying again
UNKNOWN_SECONDS = 30.0  # taken for a pull of which nothing is known yet


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """Published weights that are not in the store, and how far they are on their way: `done` of `total` bytes."""

    published: Published
    state: Literal["remote", "loading", "failed"] = "remote"
    done: int | None = None
    total: int | None = None
    failure: ServiceError | None = None
    default: bool = False


@dataclass(eq=False, slots=True)
class _Pull:
    began: float
    task: asyncio.Task[Pulled] = field(init=False)
    # Mutable state: how far it is, told by its thread.
    done: int = 0
    total: int | None = None

    def tell(self, done: int, total: int | None) -> None:
        self.done, self.total = done, total

    def seconds_left(self) -> float:
        if not self.done or not self.total:
            return UNKNOWN_SECONDS
        return (monotonic() - self.began) * (self.total / self.done - 1) + 1


class OnDemand:
    """Pulls each model once for all who wait. Its methods belong to one event loop; it lives until it is closed.

    `find` gives the versions in the store that may answer to a name; WeightsUnavailable where there are none.
    """

    def __init__(self, options: EngineOptions, find: Callable[[str], Awaitable[Sequence[StoredModel]]]) -> None:
        self.enabled = options.pull
        self._root = options.model_store
        self._default = _known(options.default_model)
        self._options = PullOptions(mirror=options.mirror)
        self._find = find
        self._thread = Workers("pull", PULLS)
        self._stop = Event()
        # Mutable state: pulls under way, and what went wrong with which lately, by variant.
        self._pulls: dict[str, _Pull] = {}
        self._failures: dict[str, tuple[float, ServiceError]] = {}

    def close(self) -> None:
        """Give up pulls under way; what they have of a file is kept for the next."""
        self._stop.set()
        self._thread.close(wait=False)

    def can(self, name: str) -> bool:
        """Whether a request for `name`, which is not in the store, would pull it, as far as is known."""
        known = _known(name) if self.enabled else None
        return known is not None and self._failure(known) is None

    async def ensure(self, name: str, patience_seconds: float | None = None) -> None:
        """Have the published weights called `name` in the store, if that is what the name means and they are not.

        A caller that is cancelled while it waits, or waits no longer than `patience_seconds`, does not stop the pull.

        Raises:
            WeightsUnavailable, WeightsInvalid, StoreNotWritable: they can't be had; the message says why.
            ModelLoading: patience ended; the pull goes on.
        """
        known = _known(name) if self.enabled else None
        if known is None or await self._there(name):
            return
        if failure := self._failure(known):
            raise copy(failure)
        under_way = self._pulls.get(known.variant) or self._begin(known)
        done, _ = await asyncio.wait([under_way.task], timeout=patience_seconds)
        if not done:
            told = f"{under_way.done / 1e6:.1f} MB" + (f" of {under_way.total / 1e6:.1f}" if under_way.total else "")
            raise ModelLoading(
                f"the weights of {known.id!r} are being fetched, {told} are here; ask again then, or wait for it",
                under_way.seconds_left(),
            )
        try:
            under_way.task.result()
        except ServiceError as error:
            raise copy(error) from None

    def remote(self, present: Container[str]) -> list[RemoteModel]:
        """The published models whose ids are not `present`."""
        return [self._status(each) for each in CATALOGUE.values() if each.id not in present]

    def one(self, name: str) -> RemoteModel | None:
        """The published model called `name`, for one that is not in the store."""
        known = _known(name)
        return self._status(known) if known else None

    async def _there(self, name: str) -> bool:
        try:
            found = await self._find(name)
        except WeightsUnavailable:
            if await detached(self._is_root_there):  # not on the threads that pull, which may all be busy for long
                return False
            raise
        return found[0].version != ""  # a folder without a version is what a pull that was killed may have left

    def _is_root_there(self) -> bool:
        try:
            return self._root.is_dir()
        except OSError:
            return False

    def _begin(self, model: Published) -> _Pull:
        under_way = self._pulls[model.variant] = _Pull(monotonic())
        run = partial(pull, self._root, model, self._options, tell=under_way.tell, stop=self._stop)
        under_way.task = asyncio.create_task(self._thread.run(run))
        under_way.task.add_done_callback(partial(self._ended, model))
        log.info("pull_begun", model=model.id)
        return under_way

    def _ended(self, model: Published, task: "asyncio.Task[Pulled]") -> None:
        seconds = monotonic() - self._pulls.pop(model.variant).began
        self._failures.pop(model.variant, None)
        if task.cancelled():
            return
        if error := task.exception():
            log.warning("pull_failed", model=model.id, reason=str(error) or type(error).__name__)
            if isinstance(error, ServiceError):
                self._failures[model.variant] = (monotonic(), error)
            return
        log.info("pulled", model=model.id, version=task.result().stored.version, seconds=round(seconds, 3))

    def _failure(self, model: Published) -> ServiceError | None:
        at, error = self._failures.get(model.variant, (0.0, None))
        return error if error and monotonic() - at < FAILURE_SECONDS else None

    def _status(self, model: Published) -> RemoteModel:
        default = model == self._default
        if under_way := self._pulls.get(model.variant):
            return RemoteModel(model, "loading", under_way.done, under_way.total, default=default)
        if failure := self._failure(model):
            return RemoteModel(model, "failed", failure=failure, default=default)
        return RemoteModel(model, default=default)


def _known(name: str) -> Published | None:
    """What the catalogue has under a name that requests use: a variant's, or the whole id."""
    try:
        found = published(name)
    except ModelNotFound:
        return None
    return found if name in {found.variant, found.id} else None
