"""What the registry keeps, model versions, and where it gets them from."""

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Generic, Literal, Protocol, TypeVar

from service.registry.residency import Footprint
from service.store.store import StoredModel

M = TypeVar("M")

UnloadReason = Literal["budget", "replaced", "unloaded"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version of a model that a name may stand for.

    `identity` is the same for the same contents; `mark` changes when its files do, so that what failed is tried again.
    """

    stored: StoredModel
    identity: str
    mark: Hashable = None


class Finder(Protocol):
    """Finds the versions that a name may stand for, the best first; at least one, else it raises a ServiceError.

    `obtain` pulls published ones into the store first, if it has none.
    """

    async def find(self, name: str) -> Sequence[Candidate]: ...  # noqa: D102
    async def obtain(self, name: str, max_wait_seconds: float | None) -> Sequence[Candidate]: ...  # noqa: D102


class Loader(Protocol[M]):
    """Loads versions, where every failure is a ServiceError, and frees them again.

    `unload` frees the one model in `only`, to which nothing else refers, by taking it out, and raises nothing.
    `footprint` is an estimate before the first load, measured afterwards; `unloading` counts.
    """

    async def load(self, stored: StoredModel) -> M: ...  # noqa: D102
    async def unload(self, only: list[M]) -> None: ...  # noqa: D102
    def memory_bytes(self, loaded: M) -> int: ...  # noqa: D102
    def footprint(self, stored: StoredModel) -> Footprint: ...  # noqa: D102
    def unloading(self, reason: UnloadReason) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class EntryStatus(Generic[M]):
    """A version in memory, on its way there, or failed; `leases` counts those who use it or wait for it."""

    stored: StoredModel
    state: Literal["loading", "ready", "failed"]
    loaded: M | None = None
    failure: BaseException | None = None
    leases: int = 0
    pinned: bool = False
    idle_seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(eq=False, slots=True)
class Entry(Generic[M]):
    """One version; see the states in `Registry`."""

    candidate: Candidate
    began: float
    footprint: Footprint
    task: "asyncio.Task[None]" = field(init=False)
    # Mutable state: where it stands; what was loaded, or why that failed; who uses it or waits for it; why it is
    # unloaded once nobody does and no name stands for it; and its standing among others.
    state: Literal["waiting", "loading", "ready", "failed", "unloading"] = "waiting"
    loaded: M | None = None
    failure: BaseException | None = None
    leases: int = 0
    reason: UnloadReason = "replaced"
    ready_at: float = inf
    used_at: float = 0.0
    credit: float = 0.0

    @property
    def stored(self) -> StoredModel:
        """The version as the store describes it."""
        return self.candidate.stored
