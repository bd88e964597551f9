"""Places for work that may hang, shared so that no host, address or client takes them all."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

_RESERVE = 3  # times the places
WAITING = 1024  # at a time, for the places of one `Shares`


class Key(NamedTuple):
    """One of those that share: `kind` says which weight it has."""

    kind: str
    name: str


class ShareTaken(Exception):
    """No place became free in time for `key`, which holds its share."""

    def __init__(self, key: Key) -> None:
        super().__init__(f"the {key.kind} {key.name} holds its share of the places")
        self.key = key


class Share(NamedTuple):
    """How much a kind of key may hold: fewer places than `weight` times the free ones.

    Where its first key holds none yet, work is admitted from a reserve too, while each key holds fewer than `reserved`.
    """

    weight: float
    reserved: int


class Thresholds:
    """A number of places, and who holds them. Decides alone; nobody waits.

    These are dynamic thresholds (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998): n keys of weight
    1 that never give a place back hold 1/(n + 1) of the places each, and as many stay free for the next. One after the
    other they can hold nearly all, so a reserve of three times as many places is for keys that hold none.
    """

    def __init__(self, places: float, shares: Mapping[str, Share]) -> None:
        self._shares = shares
        self._free, self._reserve = places, _RESERVE * places
        self._held: Counter[Key] = Counter()

    def full(self, keys: Sequence[Key]) -> Key | None:
        """The first of `keys` that holds its share already; None where all may take a place."""
        first = not self._held[keys[0]] and self._free + self._reserve > 0
        for key in keys:
            share = self._shares[key.kind]
            if self._held[key] >= max(share.reserved if first else 0, share.weight * self._free):
                return key
        return None

    def take(self, keys: Sequence[Key]) -> None:
        """One place for all of `keys` together."""
        self._free -= 1
        self._held.update(keys)

    def give_back(self, keys: Sequence[Key]) -> None:
        """The place that they took."""
        self._free += 1
        self._held.subtract(keys)
        for key in keys:
            if not self._held[key]:
                del self._held[key]


class _Waiting(NamedTuple):
    keys: Sequence[Key]
    admitted: asyncio.Future[None]


class Shares:
    """Places that are waited for, in turn among those that may have one. Of one event loop."""

    def __init__(self, places: int, shares: Mapping[str, Share], room: float = WAITING) -> None:
        """`shares`: of each kind of key; `room`: how many may wait, shared like the places."""
        self._places = Thresholds(places, shares)
        self._room = Thresholds(room, shares)
        # Whoever waits may have no place yet: all who may are admitted as soon as one is given back.
        self._waiting: deque[_Waiting] = deque()

    @asynccontextmanager
    async def place(self, keys: Sequence[Key], seconds: float | None = None) -> AsyncIterator[None]:
        """Hold a place for `keys`; wait at most `seconds` for it. Raises ShareTaken."""
        if self._places.full(keys) is None:
            self._places.take(keys)
        else:
            await self._wait(keys, seconds)
        try:
            yield
        finally:
            self._places.give_back(keys)
            self._admit()

    async def _wait(self, keys: Sequence[Key], seconds: float | None) -> None:
        """Return with a place taken."""
        if key := self._room.full(keys):
            raise ShareTaken(key)
        waiting = _Waiting(keys, asyncio.get_running_loop().create_future())
        self._room.take(keys)
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(seconds) as limit:
                await waiting.admitted
        except BaseException as error:
            if waiting.admitted.done() and not waiting.admitted.cancelled():  # admitted, and given up in the same turn
                self._places.give_back(keys)
                self._admit()
            if isinstance(error, TimeoutError) and limit.expired():
                raise ShareTaken(self._places.full(keys) or keys[0]) from None
            raise
        finally:
            self._room.give_back(keys)
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def _admit(self) -> None:
        still = deque[_Waiting]()
        for waiting in self._waiting:
            if waiting.admitted.done():  # cancelled
                continue
            if self._places.full(waiting.keys) is None:
                self._places.take(waiting.keys)
                waiting.admitted.set_result(None)
            else:
                still.append(waiting)
        self._waiting = still
