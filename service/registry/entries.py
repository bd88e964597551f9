"""What the registry knows of one model version that is in memory, on its way there, or failed to get there."""

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Generic, Literal, TypeVar

from service.errors import ServiceError
from service.eviction import Held, Hold
from service.registry.footprints import Footprint
from service.store.stored import StoredModel

M = TypeVar("M")

State = Literal["available", "loading", "ready", "failed"]
Reason = Literal["budget", "replaced", "unloaded"]  # of leaving memory


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version of a model that a name may stand for.

    `identity` is the same for the same contents; `mark` changes when its files do, so that what failed is tried again.
    """

    stored: StoredModel
    identity: str
    mark: Hashable = None


@dataclass(frozen=True, slots=True)
class Status(Generic[M]):
    """Where a model stands: `loaded` when ready, `failure` when failed; `leases` counts those who use it or wait."""

    state: State
    loaded: M | None = None
    failure: BaseException | None = None
    leases: int = 0
    pinned: bool = False
    idle_seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(eq=False, slots=True)
class Entry(Generic[M]):
    """One version. It has the place that its `footprint` says from when there is room for it: `admitted`."""

    candidate: Candidate
    began: float
    footprint: Footprint
    measure: Callable[[M], int]
    task: asyncio.Task[None] = field(init=False)
    # Mutable state: what was loaded, who uses it or waits for it, how many names stand for it, why it is to leave once
    # neither does, and its standing among others.
    loaded: M | None = None
    leases: int = 0
    names: int = 0
    pinned: bool = False
    reason: Reason = "replaced"
    admitted: bool = False
    leaving: bool = False
    ready_at: float = inf
    used_at: float = 0.0
    credit: float = 0.0

    @property
    def stored(self) -> StoredModel:
        """What the store says of it."""
        return self.candidate.stored

    @property
    def ready(self) -> bool:
        """Whether it can be used."""
        return self.ready_at < inf and not self.leaving

    @property
    def bytes(self) -> int:
        """What it takes, as measured once it is there."""
        return self.footprint.bytes if self.loaded is None else self.measure(self.loaded)

    @property
    def failure(self) -> BaseException | None:
        """Why it can't be loaded, if that is so."""
        if not self.task.done():
            return None
        return ServiceError("loading was cancelled") if self.task.cancelled() else self.task.exception()

    def held(self, min_residency_seconds: float, now: float) -> Held:
        """What evictions are decided by."""
        ripe = min(self.ready_at, now) + min_residency_seconds
        return Held(self.candidate.identity, self.bytes, self.credit, self.used_at, ripe, self.hold())

    def status(self, now: float) -> Status[M]:
        """Where it stands."""
        if not self.task.done():
            return Status("loading", leases=self.leases, pinned=self.pinned)
        if failure := self.failure:
            return Status("failed", failure=failure)
        idle = 0.0 if self.leases else now - self.used_at
        return Status("ready", self.loaded, None, self.leases, self.pinned, idle, self.bytes)

    def hold(self) -> Hold:
        """What keeps it from being evicted, if anything does."""
        if self.leaving:
            return "leaving"
        if self.pinned:
            return "pinned"
        if self.ready_at == inf:
            return "loading"
        return "in use" if self.leases else ""
