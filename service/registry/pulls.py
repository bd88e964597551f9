"""Published weights that a request needs, pulled into the store: once for all who wait."""

import asyncio
from collections.abc import Container
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event
from time import monotonic

import structlog

from service.acquisition.catalogue import CATALOGUE, CLASSES, LICENCE, SIDE, Published, published
from service.acquisition.pulling import Pulled, PullOptions, pull
from service.errors import ModelLoading, ModelNotFound
from service.machine.workers import Workers
from service.options import EngineOptions
from service.registry.versions import RemoteModel
from service.sharing import RecentErrors, shared

log = structlog.get_logger(component="on_demand")

PULLS = 2  # at a time
FAILURE_SECONDS = 30.0  # how long a failure is reported without another attempt
UNKNOWN_SECONDS = 30.0  # assumed for a pull of which nothing is known yet


@dataclass(eq=False, slots=True)
class _Pull:
    began: float
    task: "asyncio.Task[Pulled]" = field(init=False)
    # Mutable state: how far it is, set by its thread.
    done: int = 0
    total: int | None = None

    def progress(self, done: int, total: int | None) -> None:
        self.done, self.total = done, total

    def seconds_left(self) -> float:
        if not self.done or not self.total:
            return UNKNOWN_SECONDS
        return (monotonic() - self.began) * (self.total / self.done - 1) + 1


class Pulls:
    """Pulls published weights into the store. Its methods belong to one event loop; it lives until it is closed."""

    def __init__(self, options: EngineOptions) -> None:
        self._enabled = options.pull
        self._root = options.model_store
        self._default = _known(options.default_model)
        self._options = PullOptions(mirror=options.mirror)
        self._thread = Workers("pull", PULLS)
        self._stop = Event()
        # Mutable state: pulls under way, and what lately went wrong with which, by variant.
        self._under_way: dict[str, _Pull] = {}
        self._failures = RecentErrors(FAILURE_SECONDS)

    def close(self) -> None:
        """Give up pulls under way; the next one continues their files."""
        self._stop.set()
        self._thread.close(wait=False)

    def wanted(self, name: str) -> Published | None:
        """What a request for `name`, which is not in the store, would pull; None if nothing."""
        return _known(name) if self._enabled else None

    def can(self, name: str) -> bool:
        """Whether such a request would succeed, as far as is known."""
        model = self.wanted(name)
        return model is not None and self._failures.get(model.variant) is None

    async def pull(self, model: Published, max_wait_seconds: float | None = None) -> None:
        """Pull `model`. A caller that is cancelled, or waits no longer than `max_wait_seconds`, does not stop that.

        Raises:
            WeightsUnavailable, WeightsInvalid, StoreNotWritable: it can't be pulled; the message says why.
            ModelLoading: `max_wait_seconds` are over; the pull goes on.
        """
        if failure := self._failures.get(model.variant):
            raise failure
        under_way = self._under_way.get(model.variant) or self._begin(model)
        try:
            await shared(under_way.task, max_wait_seconds)
        except TimeoutError:
            of = f" of {under_way.total / 1e6:.1f}" if under_way.total else ""
            raise ModelLoading(
                f"the weights of {model.id!r} are being fetched, {under_way.done / 1e6:.1f} MB{of} are here; ask again "
                "then, or wait for it",
                under_way.seconds_left(),
            ) from None

    def remote(self, present: Container[str]) -> list[RemoteModel]:
        """The published models whose ids are not `present`."""
        return [self._status(each) for each in CATALOGUE.values() if each.id not in present]

    def one(self, name: str) -> RemoteModel | None:
        """The published model called `name`, if it is not in the store."""
        model = _known(name)
        return self._status(model) if model else None

    def _begin(self, model: Published) -> _Pull:
        under_way = self._under_way[model.variant] = _Pull(monotonic())
        blocking = partial(pull, self._root, model, self._options, on_progress=under_way.progress, stop=self._stop)
        under_way.task = asyncio.create_task(self._thread.run(blocking))
        under_way.task.add_done_callback(partial(self._ended, model))
        log.info("pull_begun", model=model.id)
        return under_way

    def _ended(self, model: Published, task: "asyncio.Task[Pulled]") -> None:
        seconds = monotonic() - self._under_way.pop(model.variant).began
        self._failures.note(model.variant, task)
        if task.cancelled():
            return
        if error := task.exception():
            log.warning("pull_failed", model=model.id, reason=str(error) or type(error).__name__)
        else:
            log.info("pulled", model=model.id, version=task.result().stored.version, seconds=round(seconds, 3))

    def _status(self, model: Published) -> RemoteModel:
        status = RemoteModel(
            id=model.id,
            variant=model.variant,
            parameters=model.parameters,
            num_classes=CLASSES,
            input_size=(SIDE, SIDE),
            accuracy=model.accuracy,
            licence=LICENCE,
            default=model == self._default,
        )
        if under_way := self._under_way.get(model.variant):
            return replace(status, state="loading", pulled_bytes=under_way.done, total_bytes=under_way.total)
        if failure := self._failures.get(model.variant):
            return replace(status, state="failed", failure=failure)
        return status


def _known(name: str) -> Published | None:
    """What the catalogue has under a name that requests use: a variant's, or the id."""
    try:
        found = published(name)
    except ModelNotFound:
        return None
    return found if name in {found.variant, found.id} else None
