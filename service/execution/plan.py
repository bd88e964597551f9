"""The batch plan: what a batch of n images costs on this machine, measured, and so which sizes are worth compiling."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from time import perf_counter
from types import MappingProxyType

# A larger batch makes each of its images wait for the whole; it must pay that back with this much more throughput.
WORTHWHILE_GAIN = 1.03
# What a batch costs beside its run, whatever its size: two changes of thread and a turn of the event loop, under load.
HAND_OVER_SECONDS = 0.0005
# A time is the least of so many runs, of fewer when they would take longer than that: interference only ever adds.
_RUNS, _MIN_RUNS, _TIMING_SECONDS = 4, 2, 0.5


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which batch sizes are compiled and t(n), the measured seconds of a batch of n on one instance.

    They were measured while all instances ran, as under load. `alone_seconds` is the time of one image that has all
    cores to itself, where a graph for that is kept.
    """

    seconds: Mapping[int, float]
    alone_seconds: float | None = None

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
        return replace(self, seconds=kept or {self.sizes[0]: self.seconds[self.sizes[0]]})


Runner = Callable[[int], object]  # runs one batch on the numbered instance


def measure(
    seconds_of: Callable[[int], float],
    ceiling: int,
    *,
    started: float | None = None,
    deadline: float = inf,
    note: Callable[[str], None] = lambda _: None,
) -> BatchPlan:
    """Compile and time sizes 1, 2, 4, ... up to `ceiling`, and stop at the first that is not worth its wait.

    Args:
        seconds_of: compiles a batch size and returns the time of a batch of it.
        ceiling: the largest size allowed.
        started: when work on size 1 began, on `perf_counter`, if before this call; larger sizes are taken to cost more.
        deadline: when to stop, on `perf_counter`; a size that would take longer is not begun, but size 1 always is.
        note: told why a size that may have paid is not part of the plan.
    """
    seconds: dict[int, float] = {}
    size = 1
    began = perf_counter() if started is None else started
    while size <= ceiling:
        try:
            t = seconds_of(size)
        except Exception as error:
            if not seconds:
                raise
            note(f"batches of {size} and more are left out, {size} failed: {type(error).__name__}: {error}")
            break
        if seconds and gain(seconds, size, t) < WORTHWHILE_GAIN:
            break
        seconds[size] = t
        size *= 2
        ended = perf_counter()
        if size <= ceiling and ended + 2 * (ended - began) > deadline:
            note(f"batches of {size} and more are left out: measuring them would take too long")
            break
        began = ended
    return BatchPlan(seconds)


def batch_seconds(run: Runner, streams: int = 1) -> float:
    """The time of a batch while `streams` of them run at the same time, in seconds."""
    together = threading.Barrier(streams)

    def timed(instance: int) -> list[float]:
        start = perf_counter()
        run(instance)  # pays for lazy allocation
        runs = max(_MIN_RUNS, min(_RUNS, int(_TIMING_SECONDS / max(perf_counter() - start, 1e-9))))
        together.wait()
        marks = [perf_counter()]
        for _ in range(runs):
            run(instance)
            marks.append(perf_counter())
        return [after - before for before, after in pairwise(marks)]

    with ThreadPoolExecutor(streams, thread_name_prefix="pvt-measure") as pool:
        return min(t for times in pool.map(timed, range(streams)) for t in times)


def gain(seconds: Mapping[int, float], size: int, t: float) -> float:
    """By how much a batch of `size` in `t` seconds gives more images per second than the best of the sizes known."""
    before = min((known + HAND_OVER_SECONDS) / n for n, known in seconds.items())
    return before * size / (t + HAND_OVER_SECONDS)
