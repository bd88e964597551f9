"""Finds out what runs a model fastest on this machine: the precision, how cores are shared out, the batch sizes.

Everything is measured on the graphs that will run. What fails is left out and noted, as long as one graph works.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from time import perf_counter

import numpy as np

from service.backends.base import Backend, Graph, Layout, Precision, Program
from service.errors import GoldenMismatch, ReferenceInvalid
from service.execution.plan import WORTHWHILE_GAIN, BatchPlan, batch_seconds, gain
from service.execution.reference import NOT_FINITE, Deviation, ReferenceCheck, is_of_all_precisions, one_line, reason

# The latency graph takes the memory of the weights once more; it must save this share of an image's time.
LATENCY_SAVES = 0.15


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tuning may choose from. `precision` None leaves the choice to the measurement."""

    cores: int
    max_batch_size: int = 8
    precision: Precision | None = None


@dataclass(frozen=True, slots=True)
class LatencyGraph:
    """How to make the graph for an image that is alone in the service, its layout, and the measured seconds."""

    layout: Layout
    seconds: float
    make: Callable[[], Graph]


@dataclass(frozen=True, slots=True)
class Tuned:
    """The outcome: `graphs` by batch size, and the latency graph, where it pays.

    `deviation` is the worst of all graphs from the reference.
    """

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
    # Mutable state: why precisions are not used, and other notes on the plan that is being made.
    _refused: dict[Precision, str] = field(init=False, default_factory=dict)
    _notes: list[str] = field(init=False, default_factory=list)

    def run(self) -> Tuned:
        """Measure and choose.

        Raises:
            GoldenMismatch: the logits are not finite, or are wrong in float32 or in the precision of the limits.
            ReferenceInvalid: the reference is not this model's.
            Exception: the backend's own, when it can compile nothing at all.
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
            tuned = self._tuned(base, precision, first)
            deviation = self.check.check_all(tuned.graphs, tuned.latency.make() if tuned.latency else None)
        except Exception as error:
            if self.limits.precision or precision == "float32" or is_of_all_precisions(error):
                raise
            self._refuse(precision, reason(error))
            return None
        return replace(tuned, notes=(*self._refused.values(), *self._notes), deviation=deviation)

    def _tuned(self, base: Layout, precision: Precision, first: Graph) -> Tuned:
        layout, (first, known), latency = self._layout(base, precision, first)
        graphs, seconds = {1: first}, {1: known}
        self._add_larger(layout, precision, graphs, seconds)
        # With fewer streams than instances, instances wait for one another.
        share = self.backend.instances / layout.streams
        plan = BatchPlan({n: t * share for n, t in seconds.items()}, latency.seconds if latency else None)
        return Tuned(precision, layout, plan, graphs, latency, ())

    def _add_larger(
        self, layout: Layout, precision: Precision, graphs: dict[int, Graph], seconds: dict[int, float]
    ) -> None:
        """Add sizes 2, 4, ... to `graphs` and `seconds`, until one is not worth its wait or would take too long."""
        began, size = self.started, 2
        while size <= self.limits.max_batch_size:
            now = perf_counter()
            if now + 2 * (now - began) > self.started + self.backend.tuning.seconds:
                self._notes.append(f"batches of {size} and more are left out: measuring them would take too long")
                return
            began = now
            try:
                graph = self.program.graph(size, layout, precision)
                t = graph_seconds(graph, size, self.shape, layout.streams)
            except Exception as error:  # noqa: BLE001  whatever it is, smaller batches work
                what = f"{type(error).__name__}: {error}"
                self._notes.append(f"batches of {size} and more are left out, {size} failed: {what}")
                return
            if gain(seconds, size, t) < WORTHWHILE_GAIN:
                return
            graphs[size], seconds[size] = graph, t
            size *= 2

    def _precision(self, layout: Layout) -> tuple[Precision, Graph]:
        """The fastest precision whose logits are good enough, and its graph for one image."""
        forced = self.limits.precision
        candidates = [forced] if forced else [each for each in self.backend.precisions if each not in self._refused]
        usable: list[tuple[Precision, Graph]] = []
        for precision in candidates:
            if usable and perf_counter() - self.started > self.backend.tuning.seconds / 4:
                break  # a more promising one works
            try:
                if graph := self._good_enough(precision, layout):
                    usable.append((precision, graph))
            except ReferenceInvalid:
                raise
            except Exception as error:
                # What was requested and can't be compiled here gives way, but no wrong answers do in silence.
                if (precision == "float32" and not usable) or (forced and isinstance(error, GoldenMismatch)):
                    raise
                self._refuse(precision, reason(error))
        if not usable:
            return "float32", self._finite("float32", layout)
        chosen, graph = usable[0]
        if len(usable) > 1:
            chosen, graph = min(usable, key=lambda each: self._probe(each[0], each[1], layout))
        if graph.precision != chosen:
            self._notes.append(f"{chosen} was requested, this machine computes in {graph.precision}")
        return graph.precision, graph

    def _good_enough(self, precision: Precision, layout: Layout) -> Graph | None:
        """The graph for one image; None if it really computes in a precision that was refused before."""
        graph = self._finite(precision, layout)
        if graph.precision in self._refused:
            return None
        if not self.limits.precision and graph.precision != "float32":
            self.check.check(graph, 1)
        return graph

    def _probe(self, precision: Precision, graph: Graph, layout: Layout) -> float:
        """The seconds by which precisions are compared; infinite if the backend can't run that batch size."""
        size = self.backend.tuning.probe_size
        try:
            probed = graph if size == 1 else self.program.graph(size, layout, precision)
            return graph_seconds(probed, size, self.shape, layout.streams)
        except Exception as error:  # noqa: BLE001  whatever it is, another precision may work
            self._notes.append(f"{precision} in batches of {size} failed with {one_line(error)}")
            return inf

    def _finite(self, precision: Precision, layout: Layout) -> Graph:
        """The graph for one image, whose outputs are finite."""
        graph = self.program.graph(1, layout, precision)
        batch = np.random.default_rng(0).integers(0, 256, (1, *self.shape, 3), dtype=np.uint8)
        if not all(np.isfinite(part).all() for part in graph.run(0, batch)):
            self.check.require_own_reference()
            raise GoldenMismatch(NOT_FINITE)
        return graph

    def _refuse(self, precision: Precision, why: str) -> None:
        self._refused[precision] = f"{precision} is not used: {why}"

    def _copied(self, blob: bytes | None, layout: Layout, precision: Precision) -> Graph:
        """The graph for one image in another layout, from its exported form, if it has one: that is faster."""
        if blob is None or self.backend.restore is None:
            return self.program.graph(1, layout, precision)
        return self.backend.restore(np.frombuffer(blob, np.uint8), layout, precision)

    def _layout(
        self, base: Layout, precision: Precision, first: Graph
    ) -> tuple[Layout, tuple[Graph, float], LatencyGraph | None]:
        """The layout with the most images per second, its graph for one image and t(1), and the latency graph."""
        graphs, seconds, alone = {base: first}, {}, {}
        blob: bytes | None = None
        for layout in self.backend.layouts(self.limits.cores):
            try:
                if layout != base:
                    blob = blob or first.export()
                    graphs[layout] = self._copied(blob, layout, precision)
                graph = graphs[layout]
                seconds[layout] = graph_seconds(graph, 1, self.shape, layout.streams)
                if layout.streams == 1:  # twice, because one disturbance on any core spoils a run on all of them
                    alone[layout] = min(seconds[layout], graph_seconds(graph, 1, self.shape))
                elif layout == base:
                    alone[layout] = graph_seconds(graph, 1, self.shape)
            except Exception as error:
                if layout == base:
                    raise
                self._notes.append(f"{layout.streams} x {layout.threads} cores failed: {one_line(error)}")
        fastest = max(seconds, key=lambda each: each.streams / seconds[each])
        more = fastest.streams / seconds[fastest] / (base.streams / seconds[base])
        best = fastest if more > WORTHWHILE_GAIN else base
        least = min(alone, key=alone.__getitem__)
        pays = least != best and alone[least] < alone[base] * (1 - LATENCY_SAVES)
        latency = LatencyGraph(least, alone[least], lambda: graphs[least]) if pays else None
        return best, (graphs[best], seconds[best]), latency
