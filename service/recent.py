"""What happened lately: counts of the last minute, which a page can show without a database of metrics."""

from collections import Counter, deque
from collections.abc import Callable, Hashable
from threading import Lock
from time import monotonic
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

WINDOW_SECONDS = 60


class Recent(Generic[K]):
    """How often each key was counted in the last `WINDOW_SECONDS` whole seconds. Thread-safe.

    Counting costs well below a microsecond, whatever the window. Keys must be few: each is kept once a second.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._start = clock()
        # Mutable state, under the lock: the second that is counted now, its counts, those of the seconds before, and
        # their sum.
        self._lock = Lock()
        self._second = 0
        self._current: dict[K, int] = {}
        self._past: deque[dict[K, int]] = deque()
        self._sum: Counter[K] = Counter()

    def __repr__(self) -> str:
        return f"<Recent {self._sum.total()} in {self.seconds} s>"

    def count(self, key: K) -> None:
        """Count `key` once."""
        with self._lock:
            self._turn()
            self._current[key] = self._current.get(key, 0) + 1

    def counts(self) -> dict[K, int]:
        """Of the whole seconds that `seconds` says."""
        with self._lock:
            self._turn()
            return dict(self._sum)

    @property
    def seconds(self) -> int:
        """How many whole seconds are in the window: fewer than `WINDOW_SECONDS` at first."""
        return min(WINDOW_SECONDS, int(self._clock() - self._start))

    def _turn(self) -> None:
        """Close the seconds that are over; those beyond the window are forgotten."""
        second = int(self._clock() - self._start)
        while self._second < second:
            if second - self._second > WINDOW_SECONDS + 1:  # nothing was counted for long
                self._second = second - WINDOW_SECONDS - 1
            self._past.append(self._current)
            self._sum.update(self._current)
            self._current = {}
            self._second += 1
            if len(self._past) > WINDOW_SECONDS:
                for key, number in self._past.popleft().items():
                    self._sum[key] -= number
                    if not self._sum[key]:
                        del self._sum[key]
