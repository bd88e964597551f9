"""A version of a model: as a candidate for a name, as the registry keeps it, and as the engine reports it."""

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Generic, Literal, Protocol, TypeVar

from service.execution.executable import LoadReport
from service.execution.plan import BatchPlan
from service.registry.residency import Footprint
from service.store.store import StoredModel

M = TypeVar("M")

UnloadReason = Literal["budget", "replaced", "unloaded", "wrong"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that a name may stand for.

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


class Free(Protocol):
    """Evicts models that are not in use until `missing`, which returns bytes, returns 0, or waiting is of no use."""

    async def __call__(self, missing: Callable[[], int]) -> None: ...  # noqa: D102


class Loader(Protocol[M]):
    """Loads versions, where every failure is a ServiceError, and frees them again.

    `load` calls `free` for memory beyond the budget of models; it evicts until nothing is missing, or gives up.

    `unload` frees the one model in `only`, to which nothing else refers, by taking it out, and raises nothing.
    `footprint` is an estimate before the first load, measured afterwards.
    """

    async def load(self, stored: StoredModel, free: "Free") -> M: ...  # noqa: D102
    async def unload(self, only: list[M], reason: UnloadReason) -> None: ...  # noqa: D102
    def memory_bytes(self, loaded: M) -> int: ...  # noqa: D102
    def footprint(self, stored: StoredModel) -> Footprint: ...  # noqa: D102


@dataclass(eq=False, slots=True)
class Entry(Generic[M]):
    """A version in the registry; see its states in `Registry`."""

    candidate: Candidate
    footprint: Footprint
    began_at: float
    task: "asyncio.Task[None]" = field(init=False)  # loads it, or frees it
    # Mutable state: where it stands; what was loaded, or why that failed; who uses it or waits for it; why it is
    # unloaded once nobody does and no name stands for it; when its load ended; when it was last used, and the
    # registry's inflation then; what was wrong with the answers of the one in whose place it is loaded.
    state: Literal["waiting", "loading", "ready", "failed", "unloading"] = "waiting"
    loaded: M | None = None
    failure: BaseException | None = None
    leases: int = 0
    reason: UnloadReason = "replaced"
    ended_at: float = inf
    used_at: float = 0.0
    inflation: float = 0.0
    distrusted: str = ""

    @property
    def stored(self) -> StoredModel:
        """The version as the store describes it."""
        return self.candidate.stored


@dataclass(frozen=True, kw_only=True)
class VersionStatus:
    """A version of a model: in the store, in memory, or both. `aliases` stand for exactly it.

    `leases` counts requests that use it or wait for it; `idle_seconds` passed since the last one.
    """

    stored: StoredModel
    state: Literal["available", "loading", "ready", "failed"]
    failure: BaseException | None = None
    aliases: Sequence[str] = ()
    leases: int = 0
    pinned: bool = False
    idle_seconds: float | None = None
    memory_bytes: int | None = None

    @property
    def id(self) -> str:
        """The model's name."""
        return self.stored.id

    @property
    def version(self) -> str:
        """Its number."""
        return self.stored.version


@dataclass(frozen=True, kw_only=True)
class ModelStatus(VersionStatus):
    """A model, in the version that answers to its name, or would; then all versions.

    The rest is known once it is loaded: how that went, its batch plan, what was tried and left out at any input size,
    whether better graphs are still being made, and by batch size the precision of graphs with another than the model's.
    """

    default: bool
    versions: Sequence[VersionStatus] = ()
    report: LoadReport | None = None
    plan: BatchPlan | None = None
    notes: Sequence[str] = ()
    optimizing: bool = False
    other_precisions: Mapping[int, str] = field(default_factory=dict)
