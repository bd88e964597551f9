"""How long things take, without the time in which the process did not run: SIGSTOP, a paused container, no core."""

import threading
from collections import deque
from time import monotonic

TICK_SECONDS = 0.5
_PAUSES = 64  # of which as many are remembered


class AwakeClock:
    """Seconds in which this process ran; somebody calls `tick` every `seconds`, or `start` has a thread do it.

    A tick that is late by more than one tick comes after a pause. Thread-safe.
    """

    def __init__(self, seconds: float = TICK_SECONDS) -> None:
        self._seconds = seconds
        # Mutable state: when each pause ended, and how long it was; the last tick; whether the thread is to end.
        self._pauses: deque[tuple[float, float]] = deque(maxlen=_PAUSES)
        self._ticked = monotonic()
        self._closed = threading.Event()

    def start(self) -> None:
        """Tick on a thread until `close`."""

        def keep_ticking() -> None:
            while not self._closed.wait(self._seconds):
                self.tick()

        self.tick()
        threading.Thread(target=keep_ticking, name="awake", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def tick(self) -> None:
        """The process runs now."""
        now = monotonic()
        if late := self._late(now):
            self._pauses.append((now, late))
        self._ticked = now

    def since(self, start: float) -> float:
        """The seconds from `start`, on `monotonic`, in which the process ran; 0 for a time to come."""
        now = monotonic()
        current = now, self._late(now)  # it may just have ended, before any tick
        pauses = [*self._pauses.copy(), current]
        paused = sum(min(seconds, end - start) for end, seconds in pauses if end > start)
        return max(0.0, now - start - paused)

    def _late(self, now: float) -> float:
        """How long the tick that is due has not come, if that is longer than a busy machine explains."""
        late = now - self._ticked - self._seconds
        return late if late > self._seconds else 0.0
