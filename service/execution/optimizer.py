"""Makes a loaded model's graphs faster while it serves: one batch size after another, each only if that is faster.

Where a backend takes minutes for its fastest graphs (`Program.optimized`), a model first serves with graphs that take
milliseconds to make, and swaps each of them as soon as a faster one is ready. Larger batches may then pay too.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import NamedTuple

from service.backends.base import Graph, Layout, OptimizedProgram, Precision, Program
from service.errors import GoldenMismatch
from service.execution.plan import WORTHWHILE_GAIN, BatchPlan, gain
from service.execution.tuning import Limits, graph_seconds
from service.machine.devices import DeviceHealth


class OptimizedGraph(NamedTuple):
    """A graph for batches of `size`, and the seconds of a batch in it while all instances run."""

    size: int
    graph: Graph
    seconds: float


@dataclass(slots=True)
class Optimizer:
    """Optimizes one model. As long as there is a `size`, call `prepare`, then `make`.

    The sizes are those of `plan`, the smallest first, then larger ones up to the limit, as long as they pay. `check`
    raises GoldenMismatch for a graph with wrong logits. Its size is tried again in float32, unless the limits name a
    precision. `notes` says what failed. After any other failure nothing is left to do, and the model keeps its graphs;
    that of a GPU is reported to `devices`.
    """

    program: Program
    optimized: OptimizedProgram
    layout: Layout
    precision: Precision
    shape: tuple[int, int]
    check: Callable[[Graph, int], object]
    plan: BatchPlan
    limits: Limits
    devices: DeviceHealth = field(default_factory=DeviceHealth)
    notes: list[str] = field(default_factory=list)
    # Mutable state: seconds by size as they are now, the sizes of the plan that are left, the next larger size, the
    # sizes that need float32, how much longer a batch takes now, under load, than when `plan` was measured, and
    # whether to stop.
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
        """The next batch size; None when nothing is left to do."""
        if self._left:
            return self._left[0]
        return self._larger if self._larger <= self.limits.max_batch_size else None

    def prepare(self) -> None:
        """Do the part that takes minutes; graphs can be made meanwhile. `stop` ends it early."""
        if size := self.size:
            try:
                with self.devices.watched():
                    self.optimized.prepare(size, self._precision(size), self._stopped)
            except Exception as error:  # noqa: BLE001  whatever it is, the model keeps its graphs
                self._give_up(size, error)

    def stop(self) -> None:
        """Make `prepare` return, because the model is unloaded. From any thread."""
        self._stopped.set()

    def make(self) -> OptimizedGraph | None:
        """Make the graph and measure it. None: it is not worth it, or has to be prepared again, in float32.

        No other graph may be made meanwhile.
        """
        if (size := self.size) is None:
            return None
        try:
            with self.devices.watched():
                made = self._replacing(size) if self._left else self._joining(size)
        except GoldenMismatch as error:
            if self.limits.precision or self._precision(size) == "float32":
                self._give_up(size, error)
            else:
                self._demoted.add(size)
                self.notes.append(f"batches of {size} are compiled in float32, {self.precision} is not used: {error}")
            return None
        except Exception as error:  # noqa: BLE001  as above
            self._give_up(size, error)
            return None
        if made:
            self._seconds[size] = made.seconds
        return made

    def _replacing(self, size: int) -> OptimizedGraph | None:
        """Makes the present graph again to compare with, because the one that serves must not be run from here."""
        graph = self._checked(size)
        present = self.program.graph(size, self.layout, self.precision)
        pairs = [(self._measured(present, size), self._measured(graph, size)) for _ in range(2)]
        before, after = (min(times) for times in zip(*pairs, strict=True))
        self._drift = before / self.plan.seconds[size]
        self._left.popleft()
        return OptimizedGraph(size, graph, after / self._drift) if after < before else None

    def _joining(self, size: int) -> OptimizedGraph | None:
        graph = self._checked(size)
        seconds = self._measured(graph, size) / self._drift
        pays = gain(self._seconds, size, seconds) >= WORTHWHILE_GAIN
        self._larger = 2 * size if pays else self.limits.max_batch_size + 1
        return OptimizedGraph(size, graph, seconds) if pays else None

    def _checked(self, size: int) -> Graph:
        graph = self.optimized.graph(size, self._precision(size))
        self.check(graph, size)
        return graph

    def _precision(self, size: int) -> Precision:
        return "float32" if size in self._demoted else self.precision

    def _measured(self, graph: Graph, size: int) -> float:
        return graph_seconds(graph, size, self.shape, self.layout.streams)

    def _give_up(self, size: int, error: Exception) -> None:
        self.notes.append(f"batches of {size} and more are not compiled: {type(error).__name__}: {error}")
        self._left.clear()
        self._larger = self.limits.max_batch_size + 1
