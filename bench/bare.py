"""What the cores can do at all: decode and inference in a loop, one thread per core, no HTTP, no queue."""

from collections.abc import Sequence
from time import perf_counter

from bench.ours import Ours


def bare_loop(ours: Ours, images: Sequence[bytes], seconds: float) -> float:
    """Images per second of `ours` over `images`, in batches of the size that its plan finds best."""
    counts = [0] * ours.instances
    start = perf_counter()

    def work(instance: int) -> None:
        while perf_counter() < start + seconds:
            turn = range(counts[instance], counts[instance] + ours.batch)
            ours.infer(instance, [ours.decode(images[i % len(images)]) for i in turn])
            counts[instance] += ours.batch

    ours.on_all(work)
    return sum(counts) / (perf_counter() - start)
