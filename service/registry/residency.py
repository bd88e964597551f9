"""What models take of the memory budget, and which of them are evicted when another needs room.

The decisions are pure, and those of GreedyDual-Size (P. Cao and S. Irani, "Cost-Aware WWW Proxy Caching Algorithms",
USITS 1997), with the measured seconds of a load as cost: each use of a model gives it the credit
`inflation + seconds / bytes`, the least credit is evicted first, and the inflation rises to the credit of what was
evicted. So what has not been used for long goes, and among equals what frees most bytes for each second of loading.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.architecture.variants import VARIANTS
from service.errors import MemoryBudgetExceeded
from service.files import atomic_write
from service.store.store import StoredModel

log = structlog.get_logger(component="residency")

# For a model that was never loaded, as measured (docs/operations.md). Compiled graphs keep the weights and one repacked
# copy for each batch size; one batch size is assumed, since what is guessed too large is never tried.
BYTES_PER_PARAMETER = {"torch": 4, "compiled": 12}  # 4 on a GPU too, where half of it is weights in 16 bits
SECONDS, SECONDS_PER_PARAMETER = 2.0, 1.5e-7
# At the peak of a load (decision 65): the module, graphs of two layouts or precisions, and one exported; of a load from
# the plan cache, one graph and its file.
PEAK_BYTES, PEAK_BYTES_PER_PARAMETER = 160_000_000, {"torch": 12, "compiled": 22}
CACHED_PEAK_BYTES, CACHED_PEAK_BYTES_PER_PARAMETER = 50_000_000, 12
# Of one more graph (decision 88): what any takes, its copy of the weights, and for each pixel of its batch and channel
# of the first stage, to which activations are proportional. torch makes no copies.
GRAPH_BYTES = {"torch": 0, "compiled": 40_000_000}
GRAPH_BYTES_PER_PARAMETER = {"torch": 0, "compiled": 9}
GRAPH_BYTES_PER_CHANNEL = 4
# Beside the first: the plain module, and its activations for one image.
MODULE_BYTES_PER_PARAMETER, MODULE_BYTES_PER_CHANNEL = 4, 10


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """A model in memory, or being loaded. `key` is unique, `name` is for messages.

    `evictable_at` is when its minimum residency ends, `used_at` when it was last used, both on the caller's clock;
    `kept_by` is what keeps it from being evicted, if anything does.
    """

    key: str
    name: str
    bytes: int
    credit: float
    used_at: float
    evictable_at: float
    kept_by: Literal["", "pinned", "in use", "loading", "unloading"] = ""


@dataclass(frozen=True, slots=True)
class Evict:
    """There is room once these are evicted, first to last, and then the inflation is this."""

    keys: tuple[str, ...]
    inflation: float


@dataclass(frozen=True, slots=True)
class Full:
    """There is no room now; there may be at `until`, if what is in use is not used any more; `inf`: never."""

    until: float


def credit(inflation: float, seconds: float, size: int) -> float:
    """The credit that a use gives a model of `size` bytes that takes `seconds` to load."""
    return inflation + seconds / max(1, size)


def used_bytes(models: Iterable[MemoryUse]) -> int:
    """What they all take."""
    return sum(each.bytes for each in models)


def make_room(
    models: Sequence[MemoryUse], needed: int, budget: int, now: float, inflation: float = 0.0
) -> Evict | Full:
    """What to evict of `models` so that `needed` bytes more stay within `budget`."""
    excess = used_bytes(models) + needed - budget
    if excess <= 0:
        return Evict((), inflation)
    evictable = [each for each in models if not each.kept_by and each.evictable_at <= now]
    if used_bytes(evictable) < excess:
        freed = 0
        for each in sorted(models, key=lambda model: model.evictable_at):
            freed += 0 if each.kept_by == "pinned" else each.bytes
            if freed >= excess:
                return Full(max(now, each.evictable_at))
        return Full(inf)
    evicted: list[MemoryUse] = []
    for each in sorted(evictable, key=lambda model: (model.credit, model.used_at)):
        if used_bytes(evicted) < excess:
            evicted.append(each)
    for each in reversed(evicted[:]):  # what need not be evicted stays, the dearest first
        if used_bytes(evicted) - each.bytes >= excess:
            evicted.remove(each)
    return Evict(tuple(each.key for each in evicted), max(inflation, *(each.credit for each in evicted)))


class Footprint(BaseModel):
    """Resident bytes and seconds of a load; `measured` unless it is an estimate.

    `peak_bytes` is what it took at once while it was compiled; 0: not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    measured: bool = True
    peak_bytes: Annotated[int, Field(ge=0)] = 0


def no_room(
    name: str, needed: Footprint, limit: int, models: Sequence[MemoryUse], seconds: float
) -> MemoryBudgetExceeded:
    """The refusal of `name`, which `needed` room within `limit` beside `models`; there may be some in `seconds`."""
    about = "" if needed.measured else "about "
    kept = ", ".join(f"{each.name} {_mb(each.bytes)} {each.kept_by or 'just loaded'}" for each in models)
    taken = (
        f"{_mb(used_bytes(models))} are taken by what can't be evicted now ({kept})" if kept else "nothing is loaded"
    )
    advice = "ask again later, unpin or unload a model, or raise" if needed.bytes <= limit else "it never fits; raise"
    return MemoryBudgetExceeded(
        f"{name} needs {about}{_mb(needed.bytes)}, PVT_MEMORY_BUDGET_MB allows {_mb(limit)} and {taken}; {advice} "
        "PVT_MEMORY_BUDGET_MB",
        seconds if seconds < inf else None,
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


class Footprints:
    """Remembers a footprint for each model version, in `folder` too if there is one. Its methods belong to one thread.

    `kind` tells apart what makes the same model take more or less: backend, precision, instances; `compiled` whether
    models are.
    """

    def __init__(self, folder: Path | None, kind: str = "", *, compiled: bool = True) -> None:
        self._folder = folder / "footprints" if folder else None
        self._kind = re.sub(r"[^\w.-]", "_", kind)
        how = "compiled" if compiled else "torch"
        self._per_parameter, self._peak_per_parameter = BYTES_PER_PARAMETER[how], PEAK_BYTES_PER_PARAMETER[how]
        self._graph, self._graph_per_parameter = GRAPH_BYTES[how], GRAPH_BYTES_PER_PARAMETER[how]
        # Mutable state: what is known, by model version.
        self._known: dict[str, Footprint] = {}

    def of(self, stored: StoredModel) -> Footprint:
        """What a load of `stored` took last, else an estimate."""
        if known := self._known.get(stored.key):
            return known
        if path := self._path(stored):
            with suppress(OSError, ValidationError):
                return self._known.setdefault(stored.key, Footprint.model_validate_json(path.read_bytes()))
        parameters = stored.card.parameters if stored.card else 0
        seconds = SECONDS + SECONDS_PER_PARAMETER * parameters
        return Footprint(bytes=self._per_parameter * parameters, seconds=seconds, measured=False)

    def peak_bytes(self, stored: StoredModel, *, cached: bool) -> int:
        """What loading `stored` takes at the peak: as measured, else an estimate; `cached`: with graphs as they are."""
        known, parameters = self.of(stored), stored.card.parameters if stored.card else 0
        if cached:
            return max(known.bytes, CACHED_PEAK_BYTES + CACHED_PEAK_BYTES_PER_PARAMETER * parameters)
        return max(known.bytes, known.peak_bytes or self.peak_of_one(stored))

    def peak_of_one(self, stored: StoredModel) -> int:
        """What compiling `stored` for batches of one is estimated to take at the peak."""
        return PEAK_BYTES + self._peak_per_parameter * (stored.card.parameters if stored.card else 0)

    def graph_bytes(self, stored: StoredModel, pixels: int) -> int:
        """What one more graph of `stored`, which is loaded, takes for batches of so many `pixels`."""
        card = stored.require_card()
        channels = VARIANTS[card.variant].embed_dims[0]
        return self._graph + self._graph_per_parameter * card.parameters + GRAPH_BYTES_PER_CHANNEL * channels * pixels

    def extension_bytes(self, stored: StoredModel, pixels: int) -> int:
        """The same of the first graph at another input size, or with stage maps: its module is made again."""
        card = stored.require_card()
        activations = MODULE_BYTES_PER_CHANNEL * VARIANTS[card.variant].embed_dims[0] * pixels
        return self.graph_bytes(stored, pixels) + MODULE_BYTES_PER_PARAMETER * card.parameters + activations

    def remember(self, stored: StoredModel, footprint: Footprint) -> None:
        """Keep what was measured. A folder that can't be written is no error."""
        self._known[stored.key] = footprint
        if path := self._path(stored):
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                atomic_write(path, footprint.model_dump_json() + "\n")
            except OSError as error:
                log.warning("footprint_not_written", model=stored.id, file=str(path), reason=str(error))

    def _path(self, stored: StoredModel) -> Path | None:
        return self._folder / f"{stored.key}.{self._kind}.json" if self._folder else None
