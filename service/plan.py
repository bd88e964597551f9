"""The batch plan: what a batch of n images costs on this machine, measured, and so which sizes are worth compiling."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from types import MappingProxyType

# A larger batch makes each of its images wait for the whole; it must pay that back with this much more throughput.
WORTHWHILE_GAIN = 1.03
# What a batch costs beside its run, whatever its size: two changes of thread and a turn of the event loop, under load.
HAND_OVER_SECONDS = 0.0005
_RUNS = 5


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which batch sizes are compiled and t(n), the measured seconds of a batch of n on one instance."""

    seconds: Mapping[int, float]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("a batch plan needs at least one size")
        object.__setattr__(self, "seconds", MappingProxyType(dict(sorted(self.seconds.items()))))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The compiled sizes, ascending."""
        return tuple(self.seconds)

    @property
    def largest(self) -> int:
        """The largest compiled size."""
        return self.sizes[-1]

    def padded(self, n: int) -> int:
        """The smallest compiled size that holds `n` images."""
        return next(size for size in self.sizes if size >= n)

    def time(self, n: int) -> float:
        """Seconds that a batch of `n` takes, padding included."""
        return self.seconds[self.padded(n)]

    def best(self, waiting: int) -> int:
        """How many of `waiting` images to run now: the count with the most images per second, padding included."""
        candidates = {size for size in self.sizes if size <= waiting} | {min(waiting, self.largest)}
        return max(candidates, key=lambda n: (n / (self.time(n) + HAND_OVER_SECONDS), n))

    def image_seconds(self) -> float:
        """Seconds of one instance per image when batches are full."""
        return min(seconds / size for size, seconds in self.seconds.items())

    def without(self, count: int) -> "BatchPlan":
        """The plan with every size that holds `count` images gone; the smallest size stays, whatever happens."""
        kept = {n: t for n, t in self.seconds.items() if n < count}
        return BatchPlan(kept or {self.sizes[0]: self.seconds[self.sizes[0]]})


def measure(prepare: Callable[[int], Callable[[], object]], ceiling: int) -> BatchPlan:
    """Compile and time sizes 1, 2, 4, ... up to `ceiling`, and stop at the first that is not worth its wait.

    Args:
        prepare: compiles a batch size and returns what runs one batch of it.
        ceiling: the largest size allowed.
    """
    seconds: dict[int, float] = {}
    size = 1
    while size <= ceiling:
        t = _time(prepare(size))
        if seconds and _gain(seconds, size, t) < WORTHWHILE_GAIN:
            break
        seconds[size] = t
        size *= 2
    return BatchPlan(seconds)


def _gain(seconds: Mapping[int, float], size: int, t: float) -> float:
    before = min((known + HAND_OVER_SECONDS) / n for n, known in seconds.items())
    return before * size / (t + HAND_OVER_SECONDS)


def _time(run: Callable[[], object]) -> float:
    run()  # the first run pays for lazy allocation

    def once() -> float:
        start = perf_counter()
        run()
        return perf_counter() - start

    return median(once() for _ in range(_RUNS))
