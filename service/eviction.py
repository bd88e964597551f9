"""Which models leave memory when another needs room. Pure decisions: times are the caller's.

GreedyDual-Size (P. Cao and S. Irani, "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997), with the measured seconds
of a load as cost: each use of a model gives it the credit `inflation + seconds / bytes`, the least credit leaves first,
and the inflation rises to the credit of what has left. So what has not been used for long goes, and among equals what
gives most bytes back for each second of loading it again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

Hold = Literal["", "pinned", "in use", "loading", "leaving"]


@dataclass(frozen=True, slots=True)
class Held:
    """A model in memory, or on its way there. `hold` is what keeps it, if anything does.

    `ripe` is when its minimum residency ends, `used` when it was last used; both on the caller's clock.
    """

    key: str
    bytes: int
    credit: float
    used: float
    ripe: float
    hold: Hold = ""


@dataclass(frozen=True, slots=True)
class Evict:
    """There is room once these have left, first to last; and then the inflation is this. None: there is room now."""

    keys: tuple[str, ...]
    inflation: float


@dataclass(frozen=True, slots=True)
class Full:
    """There is no room now; there may be at `until`, if what is in use is not used any more; `inf`: never."""

    until: float


@dataclass(frozen=True, slots=True)
class Budget:
    """`bytes` None: no limit. `min_residency_seconds` is how long what was loaded stays, against thrash.

    A load waits for room for `patience_seconds`, since most models are in use for milliseconds only.
    """

    bytes: int | None = None
    min_residency_seconds: float = 0.0
    patience_seconds: float = 5.0


def credit(inflation: float, seconds: float, size: int) -> float:
    """The credit that a use gives a model of `size` bytes that takes `seconds` to load."""
    return inflation + seconds / max(1, size)


def used_bytes(held: Iterable[Held]) -> int:
    """What they all take."""
    return sum(each.bytes for each in held)


def make_room(held: Sequence[Held], needed: int, budget: int, now: float, inflation: float = 0.0) -> Evict | Full:
    """What to evict so that `needed` bytes more stay within `budget`."""
    excess = used_bytes(held) + needed - budget
    if excess <= 0:
        return Evict((), inflation)
    free = [each for each in held if not each.hold and each.ripe <= now]
    if used_bytes(free) < excess:
        return Full(_room_at(held, excess, now))
    leaving = _cheapest(free, excess)
    return Evict(tuple(each.key for each in leaving), max(inflation, *(each.credit for each in leaving)))


def _cheapest(free: Sequence[Held], excess: int) -> list[Held]:
    """The least credit first, until it is enough; then whoever it would be enough without stays, the dearest first."""
    chosen: list[Held] = []
    for each in sorted(free, key=lambda h: (h.credit, h.used)):
        if used_bytes(chosen) >= excess:
            break
        chosen.append(each)
    for each in reversed(chosen[:]):
        if used_bytes(chosen) - each.bytes >= excess:
            chosen.remove(each)
    return chosen


def _room_at(held: Sequence[Held], excess: int, now: float) -> float:
    """When enough could have left, at the earliest."""
    freed = 0
    for each in sorted((each for each in held if each.hold != "pinned"), key=lambda h: h.ripe):
        freed += each.bytes
        if freed >= excess:
            return max(now, each.ripe)
    return inf
