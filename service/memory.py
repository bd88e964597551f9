"""One budget of bytes for what requests and loads take: bodies, decoding, answers, loads.

What does not fit is refused at once, with the figures, so that the kernel never has to end the process for want of
memory. Counted is what is about to be allocated, before it is.
"""

from collections import Counter
from collections.abc import Mapping
from threading import Lock
from types import TracebackType
from typing import Self

from service.errors import MemoryExhausted
from service.machine import resident_bytes

BODIES, ANSWERS, DECODING, MODELS, CACHE = "bodies", "answers", "decoding", "models", "cache"  # what they are for
# A reservation of so many bytes is small. The last part of the budget is for small ones only: a digit is answered
# whatever large requests hold.
SMALL_BYTES = 1_000_000  # a body of 256 kB, and what parsing its JSON takes beside it
_SMALL_SHARE = 16  # one part of so many
_LEAST_BUDGET = 64_000_000
_MOST_BODIES = 32  # of the largest size at the same time
_MOST_ANSWERS = 8  # of the largest size
RETRY_SECONDS = 2.0  # a body, an answer or a decode of the largest size takes about that long


def budget(limit: int, max_body_bytes: int, max_answer_bytes: int) -> "MemoryBudget":
    """What this process may still take of `limit` bytes, which count what is resident; 0: no limit.

    An eighth of the limit is kept for what nobody counts: stacks, fragments, workspaces. Bodies and answers have half
    of the budget each at most, and no more than a few dozens of the largest ones need.
    """
    if not limit:
        return MemoryBudget()
    left = max(_LEAST_BUDGET, limit - limit // 8 - resident_bytes())
    return MemoryBudget(
        left,
        {
            BODIES: min(left // 2, _MOST_BODIES * max_body_bytes),
            ANSWERS: min(left // 2, _MOST_ANSWERS * max_answer_bytes),
        },
    )


class MemoryBudget:
    """Counts the bytes that are reserved, by what for. Thread-safe; nothing waits."""

    def __init__(self, limit: int | None = None, most: Mapping[str, int] | None = None) -> None:
        """`limit` bytes in all (None or 0: no limit); `most` bytes for each thing that it names."""
        self.limit = limit or 0
        self.most = dict(most or {})
        self._small = self.limit // _SMALL_SHARE
        # Mutable state, under the lock: the bytes that are reserved, by what for.
        self._lock = Lock()
        self._reserved: Counter[str] = Counter()
        self._total = 0

    def __repr__(self) -> str:
        return f"<MemoryBudget {self._total}/{self.limit} {dict(self._reserved)}>"

    def reserve(self, count: int, what: str) -> "Reservation":
        """Reserve `count` bytes for `what`, which is a word such as "bodies"; release them when they are free again.

        Raises:
            MemoryExhausted: they do not fit now; nothing was reserved.
        """
        reservation = Reservation(self, what)
        if count:
            reservation.grow(count)
        return reservation

    def try_reserve(self, count: int, what: str) -> "Reservation | None":
        """The same; None where they do not fit now."""
        try:
            return self.reserve(count, what)
        except MemoryExhausted:
            return None

    def check(self, count: int, whole: int, what: str) -> None:
        """Raises MemoryExhausted where `add` would now; reserves nothing."""
        with self._lock:
            self._require(count, whole, what)

    def require_possible(self, count: int, what: str, beside: str = "") -> None:
        """Raises MemoryExhausted where waiting is of no use: `count` bytes do not fit though only `beside` is held."""
        with self._lock:
            held = self._reserved[beside] if beside else 0
        most = self.limit - self._small
        if self.limit and count + held > most:
            taken = f", of which {held / 1e6:.0f} are in use for {beside}" if held else ""
            raise MemoryExhausted(
                f"{count / 1e6:.0f} MB for {what} do not fit into the {most / 1e6:.0f} MB that the limit of the "
                f"container or PVT_MEMORY_MB leaves{taken}; raise it, or ask for less",
                retry_after_seconds=RETRY_SECONDS if count <= most else None,
            )

    def left(self) -> int:
        """The bytes that a reservation which is not small may still take."""
        with self._lock:
            return self.limit - self._small - self._total

    def reserved(self) -> dict[str, int]:
        """The bytes that are reserved now, by what for."""
        with self._lock:
            return dict(self._reserved)

    def add(self, count: int, whole: int, what: str) -> None:
        """Reserve `count` bytes more for a reservation of `whole` bytes with them; raises as `reserve`."""
        with self._lock:
            self._require(count, whole, what)
            self._reserved[what] += count
            self._total += count

    def subtract(self, count: int, what: str) -> None:
        """Free `count` bytes that were reserved for `what`."""
        with self._lock:
            self._reserved[what] -= count
            self._total -= count

    def _require(self, count: int, whole: int, what: str) -> None:
        if not self.limit:
            return
        kept = 0 if whole <= SMALL_BYTES else self._small  # for small ones
        left = self.limit - kept - self._total
        if what in self.most:
            left = min(left, self.most[what] + self._small - kept - self._reserved[what])
        if count > left:
            most = min(self.limit, self.most.get(what, self.limit))
            raise MemoryExhausted(
                f"{whole / 1e6:.1f} MB for {what} do not fit into memory now: {self._reserved[what] / 1e6:.1f} MB of "
                f"at most {most / 1e6:.1f} are in use for {what}, and {self._total / 1e6:.1f} of "
                f"{self.limit / 1e6:.1f} MB in all (PVT_MEMORY_MB); send it again later, or less at a time",
                retry_after_seconds=RETRY_SECONDS,
            )


class Reservation:
    """Bytes of a budget for one thing, until they are released. As a context manager it releases them."""

    __slots__ = ("_budget", "_what", "count")

    def __init__(self, budget: MemoryBudget, what: str) -> None:
        self._budget = budget
        self._what = what
        # Mutable state: the bytes it holds.
        self.count = 0

    def __repr__(self) -> str:
        return f"<Reservation {self.count} for {self._what}>"

    def grow(self, count: int) -> None:
        """Reserve `count` bytes more.

        Raises:
            MemoryExhausted: they do not fit now; what was reserved before stays.
        """
        self._budget.add(count, self.count + count, self._what)
        self.count += count

    def check(self, count: int) -> None:
        """Raises MemoryExhausted where it could not grow by `count` bytes now; reserves nothing."""
        self._budget.check(count, self.count + count, self._what)

    def shrink(self, count: int) -> None:
        """Free `count` of its bytes."""
        self.count -= count
        self._budget.subtract(count, self._what)

    def release(self) -> None:
        """Free what it holds; once is enough, and more often does no harm."""
        if self.count:
            self.shrink(self.count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
