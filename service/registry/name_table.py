"""What each name stands for: a model version in memory, until it stands for another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

from service.registry.entries import Entry

M = TypeVar("M")

_FOR_GOOD = object()


@dataclass(frozen=True, slots=True)
class _Stands(Generic[M]):
    """What a name stands for, as found out in the numbered `turn`."""

    entry: Entry[M]
    turn: int


class NameTable(Generic[M]):
    """Which are pinned, too. Keeps the count of names, and whether one is pinned, of each entry."""

    def __init__(self, on_change: Callable[[Entry[M]], None]) -> None:
        """`on_change` is told of each entry that got or lost a name, or lost a pin."""
        self._on_change = on_change
        self._turns = count()
        # Mutable state: the entries that names stand for, and the pinned names, whether they stand for one or not, each
        # with the attempts that pin it so far, or `_FOR_GOOD`.
        self._stands: dict[str, _Stands[M]] = {}
        self._pins: dict[str, set[object]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter([*self._stands])

    def turn(self) -> int:
        """A number to be taken before finding out what a name stands for, so that what is older changes nothing."""
        return next(self._turns)

    def get(self, name: str) -> Entry[M] | None:
        """What `name` stands for."""
        stands = self._stands.get(name)
        return stands.entry if stands else None

    def point(self, name: str, entry: Entry[M], turn: int) -> None:
        """Let `name` stand for `entry`, unless what it stands for was found out after `turn` began."""
        before = self._stands.get(name)
        if before and before.turn > turn:
            return
        self._stands[name] = _Stands(entry, turn)
        for changed in dict.fromkeys((entry, before.entry) if before else (entry,)):
            self._recount(changed)
            self._on_change(changed)

    def forget(self, entry: Entry[M]) -> None:
        """No name stands for `entry` any more."""
        for name in self:
            if self.get(name) is entry:
                del self._stands[name]
        self._recount(entry)

    def drop(self, name: str) -> None:
        """Let `name` stand for nothing."""
        entry = self._stands.pop(name).entry
        self._recount(entry)
        self._on_change(entry)

    @contextmanager
    def pinning(self, name: str) -> Iterator[None]:
        """Let whatever `name` stands for, now and later, be pinned: for good, if the block does not raise."""
        attempt = object()
        self._pins.setdefault(name, set()).add(attempt)
        if entry := self.get(name):
            self._recount(entry)
        try:
            yield
        except BaseException:
            holders = self._pins.get(name, set())
            holders.discard(attempt)
            if not holders:
                self.unpin(name)
            raise
        if attempt in (holders := self._pins.get(name, set())):  # else `unpin` was called meanwhile
            holders.remove(attempt)
            holders.add(_FOR_GOOD)

    def unpin(self, name: str) -> None:
        """End that, also for those who are still at it."""
        self._pins.pop(name, None)
        if entry := self.get(name):
            self._recount(entry)
            self._on_change(entry)

    def clear(self) -> None:
        """Forget everything."""
        self._stands.clear()
        self._pins.clear()

    def _recount(self, entry: Entry[M]) -> None:
        names = [name for name, stands in self._stands.items() if stands.entry is entry]
        entry.names = len(names)
        entry.pinned = not self._pins.keys().isdisjoint(names)
