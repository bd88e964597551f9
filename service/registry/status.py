"""What the engine says of its models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from service.backends.base import Layout
from service.execution.reference import Deviation
from service.store.cards import ModelCard, WithCard

State = Literal["available", "loading", "ready", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionStatus:
    """A version of a model: in the store, in memory, or both. `aliases` stand for exactly it.

    `leases` counts requests that use it or wait for it; `idle_seconds` passed since the last one.
    """

    id: str
    version: str
    state: State
    failure: BaseException | None = None
    aliases: Sequence[str] = ()
    leases: int = 0
    pinned: bool = False
    idle_seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus(VersionStatus, WithCard):
    """A model, in the version that answers to its name, or would; then all versions.

    What follows `backend` is None until it is loaded. `device` is `cpu` or names of GPUs; `plan` is t(n) in seconds by
    batch size, `alone_seconds` the time of one image in the latency graph, where there is one;
    `plan_cached` says whether plan and graphs came from the cache, `notes` what was tried and left out, `optimizing`
    whether better graphs are still being made, `deviation` how far its logits are from the reference's.
    `other_precisions` is by batch size, for graphs that do not compute in `precision`.
    """

    default: bool
    card: ModelCard | None
    versions: Sequence[VersionStatus] = ()
    backend: str | None = None
    device: str | None = None
    precision: str | None = None
    layout: Layout | None = None
    plan: Mapping[int, float] | None = None
    alone_seconds: float | None = None
    plan_cached: bool | None = None
    notes: Sequence[str] | None = None
    load_seconds: float | None = None
    optimizing: bool | None = None
    deviation: Deviation | None = None
    other_precisions: Mapping[int, str] | None = None
