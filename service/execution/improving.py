"""Makes a loaded model's graphs faster while it answers: one batch size after another, each only if it really is.

Where a backend takes minutes to do all it can (`Backend.improves`), a model answers with what is made in milliseconds
first, and takes over each better graph as soon as that is there. Afterwards larger batches may pay, which were not
worth their wait before.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import NamedTuple

import numpy as np

from service.backends.base import Graph, Layout, Precision, Program
from service.errors import DeviceFailed, GoldenMismatch
from service.execution.plan import WORTHWHILE_GAIN, BatchPlan, batch_seconds, gain


class Better(NamedTuple):
    """A graph for batches of `size`, and the seconds that a batch takes in it while all instances run."""

    size: int
    graph: Graph
    seconds: float


@dataclass(slots=True)
class Improving:
    """The improving of one model of `program`: as long as there is a `size`, `prepare` it, then `take` it.

    First the sizes of `plan`, the smallest first, then larger ones up to `max_batch_size`, as long as they pay. `check`
    raises where a graph for batches of a size does not give the logits that it should; such a size is tried again in
    float32, unless the precision was `forced`. `notes` says what failed, and `device_failure` what befell a GPU: then
    there is nothing more to do, and the graphs that are there stay.
    """

    program: Program
    layout: Layout
    precision: Precision
    shape: tuple[int, int]
    check: Callable[[Graph, int], object]
    plan: BatchPlan
    max_batch_size: int
    forced: bool = False
    notes: list[str] = field(default_factory=list)
    device_failure: str = ""
    # Mutable state: seconds by size as they are now, the sizes of the plan that are left, the larger size that is next,
    # the sizes that need float32, by how much what else runs slows a batch down, since `plan` was measured while
    # nothing did, and whether to stop.
    _seconds: dict[int, float] = field(init=False)
    _left: deque[int] = field(init=False)
    _larger: int = field(init=False)
    _demoted: set[int] = field(init=False, default_factory=set)
    _drift: float = field(init=False, default=1.0)
    _stopped: Event = field(init=False, default_factory=Event)

    def __post_init__(self) -> None:
        self._seconds = dict(self.plan.seconds)
        self._left = deque(self.plan.sizes)
        self._larger = 2 * self.plan.largest

    @property
    def size(self) -> int | None:
        """The batch size that is next; None when nothing is left to do."""
        if self._left:
            return self._left[0]
        return self._larger if self._larger <= self.max_batch_size else None

    def prepare(self) -> None:
        """Do the part of it that takes minutes, and touches nothing that others use; `stop` makes an end of it."""
        if size := self.size:
            try:
                self.program.prepare(size, self.layout, self._precision(size), self._stopped)
            except Exception as error:  # noqa: BLE001  whatever it is, the model goes on as it is
                self._give_up(size, error)

    def stop(self) -> None:
        """Have nothing made any more, since the model is not wanted any more. From any thread."""
        self._stopped.set()

    def take(self) -> Better | None:
        """Make the graph and measure it; None if it is not worth taking, or has to be prepared again, in float32.

        No other graph may be made meanwhile.
        """
        if (size := self.size) is None:
            return None
        try:
            better = self._replacing(size) if self._left else self._joining(size)
        except GoldenMismatch as error:
            if self.forced or self._precision(size) == "float32":
                self._give_up(size, error)
            else:
                self._demoted.add(size)
                self.notes.append(f"batches of {size} are compiled in float32, {self.precision} is not used: {error}")
            return None
        except Exception as error:  # noqa: BLE001  as above
            self._give_up(size, error)
            return None
        if better:
            self._seconds[size] = better.seconds
        return better

    def _replacing(self, size: int) -> Better | None:
        """The graph as it is now is made anew to compare with: the one that answers must not be run from here."""
        better = self._faster(size)
        now = self.program.graph(size, self.layout, self.precision)
        pairs = [(self._measured(now, size), self._measured(better, size)) for _ in range(2)]
        before, after = (min(times) for times in zip(*pairs, strict=True))
        self._drift = before / self.plan.seconds[size]
        self._left.popleft()
        return Better(size, better, after / self._drift) if after < before else None

    def _joining(self, size: int) -> Better | None:
        graph = self._faster(size)
        seconds = self._measured(graph, size) / self._drift
        pays = gain(self._seconds, size, seconds) >= WORTHWHILE_GAIN
        self._larger = 2 * size if pays else self.max_batch_size + 1
        return Better(size, graph, seconds) if pays else None

    def _faster(self, size: int) -> Graph:
        graph = self.program.faster(size, self.layout, self._precision(size))
        self.check(graph, size)
        return graph

    def _precision(self, size: int) -> Precision:
        return "float32" if size in self._demoted else self.precision

    def _measured(self, graph: Graph, size: int) -> float:
        batch = np.random.default_rng(size).integers(0, 256, (size, *self.shape, 3), dtype=np.uint8)
        return batch_seconds(lambda instance: graph.run(instance, batch), self.layout.streams)

    def _give_up(self, size: int, error: Exception) -> None:
        self.notes.append(f"batches of {size} and more are not compiled: {type(error).__name__}: {error}")
        if isinstance(error, DeviceFailed):
            self.device_failure = str(error)
        self._left.clear()
        self._larger = self.max_batch_size + 1
