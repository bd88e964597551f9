"""Makes a loaded model's graphs faster while it answers: one batch size after another, each only if it really is.

Where a backend takes minutes to do all it can (`Backend.improves`), a model answers with what is made in milliseconds
first, and takes over each better graph as soon as that is there. Afterwards larger batches may pay, which were not
worth their wait before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from service.backends.base import Graph, Layout, Precision, Program
from service.plan import WORTHWHILE_GAIN, BatchPlan, batch_seconds, gain


class Better(NamedTuple):
    """A graph for batches of `size`, and the seconds that a batch takes in it while all instances run."""

    size: int
    graph: Graph
    seconds: float


@dataclass(slots=True)
class Improving:
    """The improving of one model of `program`; call `steps` once, on one thread.

    `check` raises where a graph for batches of a size does not give the logits that it should. `notes` says what
    failed: the graphs that are there stay then.
    """

    program: Program
    layout: Layout
    precision: Precision
    shape: tuple[int, int]
    check: Callable[[Graph, int], object]
    max_batch_size: int
    notes: list[str] = field(default_factory=list)

    def steps(self, plan: BatchPlan) -> Iterator[Better]:
        """Better graphs for the sizes of `plan`, the smallest first, then graphs for larger ones, as long as they pay.

        Each takes as long as compiling; whoever wants no more stops asking.
        """
        seconds = dict(plan.seconds)
        drift = 1.0  # by how much what else runs now slows a batch down, since `plan` was measured while nothing did
        for size, before in plan.seconds.items():
            try:
                now, graph, faster = self._compared(size)
            except Exception as error:  # noqa: BLE001  whatever it is, the model goes on as it is
                self._note(size, error)
                return
            drift = now / before
            if faster < now:
                seconds[size] = faster / drift
                yield Better(size, graph, seconds[size])
        yield from self._larger(seconds, drift)

    def _larger(self, seconds: dict[int, float], drift: float) -> Iterator[Better]:
        size = 2 * max(seconds)
        while size <= self.max_batch_size:
            try:
                graph = self._faster(size)
                t = self._seconds(graph, size) / drift
            except Exception as error:  # noqa: BLE001  as above
                self._note(size, error)
                return
            if gain(seconds, size, t) < WORTHWHILE_GAIN:
                return
            seconds[size] = t
            yield Better(size, graph, t)
            size *= 2

    def _compared(self, size: int) -> tuple[float, Graph, float]:
        """Seconds in a graph as it is now, one that is to be better, and seconds in that; measured in turn.

        The graph as it is now is made anew: the one that answers must not be run from here.
        """
        better = self._faster(size)
        now = self.program.graph(size, self.layout, self.precision)
        seconds = [(self._seconds(now, size), self._seconds(better, size)) for _ in range(2)]
        return min(each[0] for each in seconds), better, min(each[1] for each in seconds)

    def _faster(self, size: int) -> Graph:
        graph = self.program.faster(size, self.layout, self.precision)
        self.check(graph, size)
        return graph

    def _seconds(self, graph: Graph, size: int) -> float:
        batch = np.random.default_rng(size).integers(0, 256, (size, *self.shape, 3), dtype=np.uint8)
        return batch_seconds(lambda instance: graph.run(instance, batch), self.layout.streams)

    def _note(self, size: int, error: Exception) -> None:
        self.notes.append(f"batches of {size} and more are not compiled: {type(error).__name__}: {error}")
