"""Finds out what runs a model fastest on this machine: the precision, how cores are shared out, the batch sizes.

`Tuning` measures the graphs that will run when a model is loaded; what fails is left out and noted, as long as one
works. Where a backend takes minutes for its fastest graphs, `Optimizer` makes these while the model serves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from threading import Event
from time import perf_counter
from typing import NamedTuple

import numpy as np

from service.backends.base import Backend, Blob, DeviceHealth, Graph, Layout, OptimizedGraphs, Precision, Program
from service.errors import GoldenMismatch, ReferenceInvalid
from service.execution.plan import WORTHWHILE_GAIN, BatchPlan, batch_seconds, gain
from service.execution.reference import NOT_FINITE, Deviation, ReferenceCheck, concerns_precision, one_line, reason

# The latency graph takes the memory of the weights once more; it must save this share of an image's time.
LATENCY_SAVES = 0.15


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tuning may choose from; `precision` None leaves the choice to the measurement."""

    cores: int
    max_batch_size: int = 8
    precision: Precision | None = None


# Reserves memory for one more graph, which computes so many pixels at a time; raises MemoryExhausted.
Reserve = Callable[[int], object]


def unlimited(_: int) -> None:
    """A `Reserve` that never raises."""


@dataclass(frozen=True, slots=True)
class LatencyGraph:
    """How to make the graph for an image that is alone in the service, its layout, and the measured seconds.

    `blob` is the exported graph for one image, where the latency graph keeps that in memory.
    """

    layout: Layout
    seconds: float
    make: Callable[[], Graph]
    blob: Blob | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """The outcome: `graphs` by batch size, the latency graph, where it pays, and the worst deviation of all graphs."""

    precision: Precision
    layout: Layout
    plan: BatchPlan
    graphs: dict[int, Graph]
    latency: LatencyGraph | None
    notes: tuple[str, ...]
    deviation: Deviation | None = None


def graph_seconds(graph: Graph, size: int, shape: tuple[int, int], streams: int = 1) -> float:
    """The seconds of a batch of `size` images of `shape` in `graph`, while `streams` batches run at the same time."""
    batch = np.random.default_rng(size).integers(0, 256, (size, *shape, 3), dtype=np.uint8)
    return batch_seconds(lambda instance: graph.run(instance, batch), streams)


@dataclass(slots=True)
class Tuning:
    """One tuning of one model on one backend; call `run` once.

    A precision below float32 is not used at all if any graph of the plan fails the check in it.
    """

    backend: Backend
    program: Program
    check: ReferenceCheck
    shape: tuple[int, int]
    limits: Limits
    started: float = field(default_factory=perf_counter)
    reserve: Reserve = unlimited
    # Mutable state: why precisions are not used, and other notes on the plan that is being made.
    _refused: dict[Precision, str] = field(init=False, default_factory=dict)
    _notes: list[str] = field(init=False, default_factory=list)

    def run(self) -> Tuned:
        """Measure and choose.

        Raises GoldenMismatch if logits are not finite, or wrong in float32 or in the precision of the limits,
        ReferenceInvalid if the reference is not this model's, or the backend's own error if it can compile nothing.
        """
        while (tuned := self._attempt()) is None:
            self._notes.clear()
            self.started = perf_counter()
        return tuned

    def _attempt(self) -> Tuned | None:
        """Tune with the best precision that is left; None if it has to be given up."""
        base = self.backend.layouts(self.limits.cores)[0]
        precision, first = self._precision(base)
        try:
            layout, (first, known), latency = self._layout(base, precision, first)
            graphs, seconds = {1: first}, {1: known}
            self._add_larger(layout, precision, graphs, seconds)
            deviation = self.check.check_all(graphs, latency.make() if latency else None)
        except Exception as error:
            if self.limits.precision or precision == "float32" or not concerns_precision(error):
                raise
            self._refused[precision] = f"{precision} is not used: {reason(error)}"
            return None
        # With fewer streams than instances, instances wait for one another.
        share = self.backend.instances / layout.streams
        plan = BatchPlan({n: t * share for n, t in seconds.items()}, latency.seconds if latency else None)
        return Tuned(precision, layout, plan, graphs, latency, (*self._refused.values(), *self._notes), deviation)

    def _precision(self, layout: Layout) -> tuple[Precision, Graph]:
        """The fastest precision whose logits are good enough, and its graph for one image."""
        forced = self.limits.precision
        candidates = [forced] if forced else [each for each in self.backend.precisions if each not in self._refused]
        usable: list[tuple[Precision, Graph]] = []
        for precision in candidates:
            if usable and perf_counter() - self.started > self.backend.tuning_seconds / 4:
                break  # a more promising one works
            try:
                graph = self._finite(precision, layout)
                if graph.precision not in self._refused:
                    if not forced and graph.precision != "float32":
                        self.check.check(graph, 1)
                    usable.append((precision, graph))
            except Exception as error:
                # A requested precision that can't be compiled gives way; one that gives wrong logits does not.
                wrong = isinstance(error, (ReferenceInvalid, GoldenMismatch) if forced else ReferenceInvalid)
                if wrong or (precision == "float32" and not usable):
                    raise
                self._refused[precision] = f"{precision} is not used: {reason(error)}"
        if not usable:
            return "float32", self._finite("float32", layout)
        chosen, graph = usable[0]
        if len(usable) > 1:
            chosen, graph = min(usable, key=lambda each: self._probe(each[0], each[1], layout))
        if graph.precision != chosen:
            self._notes.append(f"{chosen} was requested, this machine computes in {graph.precision}")
        return graph.precision, graph

    def _finite(self, precision: Precision, layout: Layout) -> Graph:
        """The graph for one image, whose outputs are finite."""
        graph = self.program.graph(1, layout, precision)
        batch = np.random.default_rng(0).integers(0, 256, (1, *self.shape, 3), dtype=np.uint8)
        if not all(np.isfinite(part).all() for part in graph.run(0, batch)):
            self.check.require_own_reference()
            raise GoldenMismatch(NOT_FINITE)
        return graph

    def _probe(self, precision: Precision, graph: Graph, layout: Layout) -> float:
        """The seconds by which precisions are compared; infinite if the backend can't run that batch size."""
        size = self.backend.probe_size
        try:
            probed = graph if size == 1 else self.program.graph(size, layout, precision)
            return graph_seconds(probed, size, self.shape, layout.streams)
        except Exception as error:  # noqa: BLE001  whatever it is, another precision may work
            self._notes.append(f"{precision} in batches of {size} failed with {one_line(error)}")
            return inf

    def _layout(
        self, base: Layout, precision: Precision, first: Graph
    ) -> tuple[Layout, tuple[Graph, float], LatencyGraph | None]:
        """The layout with the most images per second, its graph for one image and t(1), and the latency graph."""
        graphs, seconds, alone = {base: first}, {}, {}
        blob: Blob | None = None
        restore = self.backend.restore
        for layout in self.backend.layouts(self.limits.cores):
            try:
                if layout != base:
                    if restore and blob is None and (exported := first.export()):
                        blob = np.frombuffer(exported, np.uint8)
                        del exported
                    graphs[layout] = (  # to restore an exported graph is faster
                        restore(blob, layout, precision)
                        if restore and blob is not None
                        else self.program.graph(1, layout, precision)
                    )
                seconds[layout] = graph_seconds(graphs[layout], 1, self.shape, layout.streams)
                if layout == base or layout.streams == 1:
                    alone[layout] = graph_seconds(graphs[layout], 1, self.shape)
                if layout.streams == 1:  # both, because one disturbance on any core spoils a run on all of them
                    alone[layout] = min(alone[layout], seconds[layout])
            except Exception as error:
                if layout == base:
                    raise
                self._notes.append(f"{layout.streams} x {layout.threads} cores failed: {one_line(error)}")
        fastest = max(seconds, key=lambda each: each.streams / seconds[each])
        more = fastest.streams / seconds[fastest] / (base.streams / seconds[base])
        best = fastest if more > WORTHWHILE_GAIN else base
        least = min(alone, key=alone.__getitem__)
        pays = least != best and alone[least] < alone[base] * (1 - LATENCY_SAVES)
        quickest = graphs[least]  # which keeps no other
        latency = LatencyGraph(least, alone[least], lambda: quickest, blob) if pays else None
        return best, (graphs[best], seconds[best]), latency

    def _add_larger(
        self, layout: Layout, precision: Precision, graphs: dict[int, Graph], seconds: dict[int, float]
    ) -> None:
        """Add sizes 2, 4, ... to `graphs` and `seconds`, until one is not worth its wait or would take too long."""
        began, size = self.started, 2
        while size <= self.limits.max_batch_size:
            now = perf_counter()
            if now + 2 * (now - began) > self.started + self.backend.tuning_seconds:
                self._notes.append(f"batches of {size} and more are left out: measuring them would take too long")
                return
            began = now
            try:
                self.reserve(size * self.shape[0] * self.shape[1])
                graph = self.program.graph(size, layout, precision)
                t = graph_seconds(graph, size, self.shape, layout.streams)
            except Exception as error:  # noqa: BLE001  whatever it is, smaller batches work
                self._notes.append(f"batches of {size} and more are left out, {size} failed: {one_line(error)}")
                return
            if gain(seconds, size, t) < WORTHWHILE_GAIN:
                return
            graphs[size], seconds[size] = graph, t
            size *= 2


class OptimizedGraph(NamedTuple):
    """A graph for batches of `size`, and the seconds of a batch in it while all instances run."""

    size: int
    graph: Graph
    seconds: float


@dataclass(slots=True)
class Optimizer:
    """Makes one model's graphs faster while it serves. As long as there is a `size`, call `prepare`, then `make`.

    The sizes are those of `plan`, the smallest first, then larger ones up to the limit, as long as they pay. Where
    `check` raises GoldenMismatch, the size is tried again in float32, unless the limits name a precision. After any
    other failure, which `notes` names, the model keeps its graphs; that of a GPU is reported to `devices`.
    """

    program: Program
    optimized: OptimizedGraphs
    layout: Layout
    precision: Precision
    shape: tuple[int, int]
    check: Callable[[Graph, int], object]
    plan: BatchPlan
    limits: Limits
    devices: DeviceHealth = field(default_factory=DeviceHealth)
    # Mutable state, besides `plan`, which gets the new seconds: notes; the next batch size, None when nothing is left
    # to do, and its precision; how much longer a batch takes now, under load, than in `plan`; and whether to stop.
    notes: list[str] = field(init=False, default_factory=list)
    size: int | None = field(init=False)
    _size_precision: Precision = field(init=False)
    _drift: float = field(init=False, default=1.0)
    _stopped: Event = field(init=False, default_factory=Event)

    def __post_init__(self) -> None:
        self.size = self.plan.sizes[0]
        self._size_precision = self.precision

    def prepare(self) -> None:
        """Do the part that takes minutes; graphs can be made meanwhile. `stop` ends it early."""
        if self.size is None:
            return
        try:
            with self.devices.watched():
                self.optimized.prepare(self.size, self._size_precision, self._stopped)
        except Exception as error:  # noqa: BLE001  whatever it is, the model keeps its graphs
            self._give_up(self.size, error)

    def stop(self) -> None:
        """Make `prepare` return, because the model is unloaded. From any thread."""
        self._stopped.set()

    def make(self) -> OptimizedGraph | None:
        """Make the graph and measure it, alone. None: it is not worth it, or has to be prepared again, in float32."""
        if (size := self.size) is None:
            return None
        try:
            with self.devices.watched():
                return self._measured(size)
        except Exception as error:  # noqa: BLE001  as above
            if not isinstance(error, GoldenMismatch) or self.limits.precision or self._size_precision == "float32":
                self._give_up(size, error)
            else:
                self._size_precision = "float32"
                self.notes.append(f"batches of {size} are compiled in float32, {self.precision} is not used: {error}")
            return None

    def _measured(self, size: int) -> OptimizedGraph | None:
        graph = self.optimized.graph(size, self._size_precision)
        self.check(graph, size)
        if planned := size in self.plan.seconds:
            # The graph that serves must not be run from here, so it is made again to compare with.
            present = self.program.graph(size, self.layout, self.precision)
            pairs = [(self._time(present, size), self._time(graph, size)) for _ in range(2)]
            before, after = (min(times) for times in zip(*pairs, strict=True))
            self._drift = before / self.plan.seconds[size]
            seconds, pays = after / self._drift, after < before
        else:
            seconds = self._time(graph, size) / self._drift
            pays = gain(self.plan.seconds, size, seconds) >= WORTHWHILE_GAIN
        following = next((each for each in self.plan.sizes if each > size), 2 * size)
        self.size = following if following <= self.limits.max_batch_size and (planned or pays) else None
        self._size_precision = self.precision
        if not pays:
            return None
        self.plan = replace(self.plan, seconds={**self.plan.seconds, size: seconds})
        return OptimizedGraph(size, graph, seconds)

    def _time(self, graph: Graph, size: int) -> float:
        return graph_seconds(graph, size, self.shape, self.layout.streams)

    def _give_up(self, size: int, error: Exception) -> None:
        self.notes.append(f"batches of {size} and more are not compiled: {one_line(error)}")
        self.size = None
