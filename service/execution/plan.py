"""The batch plan: the measured time of a batch of n images on this machine, and which sizes are worth compiling."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from time import perf_counter
from types import MappingProxyType

# Each image of a larger batch waits for the whole batch, which must be worth at least this much more throughput.
WORTHWHILE_GAIN = 1.03
# What a batch of any size costs besides its run: two changes of thread and a turn of the event loop, under load.
HAND_OVER_SECONDS = 0.0005
# A time is the least of this many runs, or of fewer if they would take longer: interference only ever adds.
_RUNS, _MIN_RUNS, _TIMING_SECONDS = 4, 2, 0.5


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which batch sizes are compiled and t(n), the measured seconds of a batch of n on one instance.

    They were measured while all instances ran, as under load. `alone_seconds` is the time of one image in the latency
    graph, where there is one.
    """

    seconds: Mapping[int, float]
    alone_seconds: float | None = None
    # The compiled sizes, ascending, the largest, and t(n) for each n from 0 on: read several times for each image.
    sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    largest: int = field(init=False, repr=False, compare=False)
    _times: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("a batch plan needs at least one size")
        seconds = dict(sorted(self.seconds.items()))
        object.__setattr__(self, "seconds", MappingProxyType(seconds))
        object.__setattr__(self, "sizes", tuple(seconds))
        object.__setattr__(self, "largest", self.sizes[-1])
        times = (next(t for size, t in seconds.items() if size >= n) for n in range(self.largest + 1))
        object.__setattr__(self, "_times", tuple(times))

    def time(self, n: int) -> float:
        """Seconds that a batch of `n` takes, padded to the next compiled size."""
        if n > self.largest:
            raise ValueError(f"a batch of {n}; the largest compiled size is {self.largest}")
        return self._times[n]

    def best(self, waiting: int) -> int:
        """The number of `waiting` images to run now, for the most images per second, padding included."""
        candidates = {size for size in self.sizes if size <= waiting} | {min(waiting, self.largest)}
        return max(candidates, key=lambda n: (n / (self.time(n) + HAND_OVER_SECONDS), n))

    def image_seconds(self) -> float:
        """Seconds of one instance per image when batches are full."""
        return min(seconds / size for size, seconds in self.seconds.items())

    def without(self, count: int) -> "BatchPlan":
        """The plan without the sizes that hold `count` images; the smallest size always stays."""
        kept = {n: t for n, t in self.seconds.items() if n < count}
        return replace(self, seconds=kept or {self.sizes[0]: self.seconds[self.sizes[0]]})


def batch_seconds(run: Callable[[int], object], streams: int = 1) -> float:
    """The seconds of a batch while `streams` of them run at the same time; `run` runs one on the numbered instance."""
    together = threading.Barrier(streams)

    def timed(instance: int) -> list[float]:
        start = perf_counter()
        try:
            run(instance)  # pays for lazy allocation
            runs = max(_MIN_RUNS, min(_RUNS, int(_TIMING_SECONDS / max(perf_counter() - start, 1e-9))))
        finally:
            together.wait()  # after a failure too, for which the others would wait forever
        marks = [perf_counter()]
        for _ in range(runs):
            run(instance)
            marks.append(perf_counter())
        return [after - before for before, after in pairwise(marks)]

    with ThreadPoolExecutor(streams, thread_name_prefix="pvt-measure") as pool:
        return min(t for times in pool.map(timed, range(streams)) for t in times)


def gain(seconds: Mapping[int, float], size: int, t: float) -> float:
    """Images per second of a batch of `size` in `t` seconds, divided by those of the best size in `seconds`."""
    before = min((known + HAND_OVER_SECONDS) / n for n, known in seconds.items())
    return before * size / (t + HAND_OVER_SECONDS)
