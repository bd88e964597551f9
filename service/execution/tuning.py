"""Finds out what runs a model fastest on this machine: the precision, how cores are shared out, the batch sizes.

Everything is measured on the graphs that will run. What does not work is left out and noted, as long as one graph is
left that does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from time import perf_counter

import numpy as np

from service.backends.base import Backend, Graph, Layout, Precision, Program
from service.errors import GoldenMismatch, ReferenceInvalid
from service.execution.golden import NOT_FINITE, Golden, in_words, is_of_all_precisions, told
from service.execution.plan import WORTHWHILE_GAIN, BatchPlan, Runner, batch_seconds, measure
from service.execution.reference import Deviation

# The graph for a lone image costs its memory again; it must save that share of the image's time.
ALONE_SAVES = 0.15


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tuning may choose from. `precision` None leaves it to the measurement."""

    cores: int
    max_batch_size: int = 8
    precision: Precision | None = None


@dataclass(frozen=True, slots=True)
class Alone:
    """What runs an image that is alone in the service: the layout, its measured seconds, and how to get the graph."""

    layout: Layout
    seconds: float
    make: Callable[[], Graph]


@dataclass(frozen=True, slots=True)
class Tuned:
    """The outcome. `graphs` are by batch size; `alone` runs one image on all cores, where that pays.

    `deviation` is how far all of them are from the reference.
    """

    precision: Precision
    layout: Layout
    plan: BatchPlan
    graphs: dict[int, Graph]
    alone: Alone | None
    notes: tuple[str, ...]
    deviation: Deviation | None = None


@dataclass(slots=True)
class Tuning:
    """One tuning of one model on one backend; call `run` once.

    A precision below float32 has to give the logits of the model's reference images in every graph of the plan, or it
    is not used in any.
    """

    backend: Backend
    program: Program
    golden: Golden
    shape: tuple[int, int]
    limits: Limits
    started: float = field(default_factory=perf_counter)
    # Mutable state: why precisions are not used, and what else there is to say of the plan that is being made.
    _refused: dict[Precision, str] = field(init=False, default_factory=dict)
    _notes: list[str] = field(init=False, default_factory=list)

    def run(self) -> Tuned:
        """Measure and choose.

        Raises:
            GoldenMismatch: the model gives no finite numbers, or other logits than it should in float32 or in the
                precision that was asked for.
            ReferenceInvalid: the reference is not this model's.
            Exception: what the backend raises when nothing at all can be compiled.
        """
        while (sound := self._sound()) is None:
            self._notes.clear()
            self.started = perf_counter()
        return sound

    def _sound(self) -> Tuned | None:
        """What was chosen, with how far it is off; None where its precision is given up."""
        base = self.backend.layouts(self.limits.cores)[0]
        precision, first = self._precision(base)
        try:
            tuned = self._tuned(base, precision, first)
            deviation = self.golden.check_all(tuned.graphs, tuned.alone.make() if tuned.alone else None)
        except Exception as error:
            if self.limits.precision or precision == "float32" or is_of_all_precisions(error):
                raise
            self._refuse(precision, told(error))
            return None
        return replace(tuned, notes=(*self._refused.values(), *self._notes), deviation=deviation)

    def _tuned(self, base: Layout, precision: Precision, first: Graph) -> Tuned:
        layout, (first, known), alone = self._layout(base, precision, first)
        graphs = {1: first}

        def seconds_of(size: int) -> float:
            if size == 1:
                return known
            graphs[size] = self.program.graph(size, layout, precision)
            return batch_seconds(self._runner(graphs[size], size), layout.streams)

        deadline = self.started + self.backend.tuning_seconds
        plan = measure(
            seconds_of, self.limits.max_batch_size, started=self.started, deadline=deadline, note=self._notes.append
        )
        # A layout of fewer streams than instances makes instances wait for one another.
        share = self.backend.instances / layout.streams
        seconds = {n: t * share for n, t in plan.seconds.items()}
        kept = {size: graphs[size] for size in plan.sizes}
        return Tuned(precision, layout, BatchPlan(seconds, alone.seconds if alone else None), kept, alone, ())

    def _precision(self, layout: Layout) -> tuple[Precision, Graph]:
        """The fastest precision whose answers are good enough, and its graph for one image."""
        forced = self.limits.precision
        usable: list[tuple[Precision, Graph]] = []
        for precision in (
            [forced] if forced else [each for each in self.backend.precisions if each not in self._refused]
        ):
            if usable and self._spent() > self.backend.tuning_seconds / 4:
                break  # the more promising one works
            try:
                if graph := self._good_enough(precision, layout):
                    usable.append((precision, graph))
            except ReferenceInvalid:
                raise
            except Exception as error:
                # What was asked for and can't be compiled here gives way, but no wrong answers do in silence.
                if (precision == "float32" and not usable) or (forced and isinstance(error, GoldenMismatch)):
                    raise
                self._refuse(precision, told(error))
        if not usable:
            return "float32", self._checked("float32", layout)
        asked, graph = usable[0]
        if len(usable) > 1:
            asked, graph = min(usable, key=lambda each: self._probe(each[0], each[1], layout))
        if graph.precision != asked:
            self._notes.append(f"{asked} was asked for, this machine computes in {graph.precision}")
        return graph.precision, graph

    def _good_enough(self, precision: Precision, layout: Layout) -> Graph | None:
        """The graph for one image; None where it computes in what was refused already, whatever was asked for."""
        graph = self._checked(precision, layout)
        if graph.precision in self._refused:
            return None
        if not self.limits.precision and graph.precision != "float32":
            self.golden.check(graph, 1)
        return graph

    def _probe(self, precision: Precision, graph: Graph, layout: Layout) -> float:
        """The seconds by which precisions are compared; infinite where it can't be run."""
        size = self.backend.probe_size
        try:
            probed = graph if size == 1 else self.program.graph(size, layout, precision)
            return batch_seconds(self._runner(probed, size), layout.streams)
        except Exception as error:  # noqa: BLE001  whatever it is, another one may work
            self._notes.append(f"{precision} in batches of {size} failed with {in_words(error)}")
            return inf

    def _checked(self, precision: Precision, layout: Layout) -> Graph:
        graph = self.program.graph(1, layout, precision)
        self._check_finite(graph)
        return graph

    def _refuse(self, precision: Precision, why: str) -> None:
        self._refused[precision] = f"{precision} is not used: {why}"

    def _layout(
        self, base: Layout, precision: Precision, first: Graph
    ) -> tuple[Layout, tuple[Graph, float], Alone | None]:
        """The layout with the most images per second, its graph for one image and t(1), and what serves a lone one."""
        copy = _Copies(self.backend, self.program, first, precision)
        graphs, seconds, lone_seconds = {base: first}, {}, {}
        for layout in self.backend.layouts(self.limits.cores):
            try:
                graphs[layout] = graphs.get(layout) or copy.make(layout)
                run = self._runner(graphs[layout], 1)
                seconds[layout] = batch_seconds(run, layout.streams)
                if layout.streams == 1:  # which one moment of a neighbour's work on either core spoils: twice
                    lone_seconds[layout] = min(seconds[layout], batch_seconds(run))
                elif layout == base:
                    lone_seconds[layout] = batch_seconds(run)
            except Exception as error:
                if layout == base:
                    raise
                self._notes.append(f"{layout.streams} x {layout.threads} cores failed: {in_words(error)}")
        fastest = max(seconds, key=lambda each: each.streams / seconds[each])
        gain = fastest.streams / seconds[fastest] / (base.streams / seconds[base])
        best = fastest if gain > WORTHWHILE_GAIN else base
        lone = min(lone_seconds, key=lone_seconds.__getitem__)
        pays = lone != best and lone_seconds[lone] < lone_seconds[base] * (1 - ALONE_SAVES)
        alone = Alone(lone, lone_seconds[lone], lambda: graphs[lone]) if pays else None
        return best, (graphs[best], seconds[best]), alone

    def _runner(self, graph: Graph, size: int) -> Runner:
        batch = np.random.default_rng(size).integers(0, 256, (size, *self.shape, 3), dtype=np.uint8)
        return lambda instance: graph.run(instance, batch)

    def _check_finite(self, graph: Graph) -> None:
        batch = np.random.default_rng(0).integers(0, 256, (1, *self.shape, 3), dtype=np.uint8)
        if not all(np.isfinite(part).all() for part in graph.run(0, batch)):
            self.golden.require_own_reference()
            raise GoldenMismatch(NOT_FINITE)

    def _spent(self) -> float:
        return perf_counter() - self.started


@dataclass(slots=True)
class _Copies:
    """Makes the same graph again in other layouts, from its compiled form where it has one: that is faster."""

    backend: Backend
    program: Program
    first: Graph
    precision: Precision
    blob: bytes | None = None

    def make(self, layout: Layout) -> Graph:
        self.blob = self.blob or self.first.export()
        if self.blob is None:
            return self.program.graph(1, layout, self.precision)
        return self.backend.restore(np.frombuffer(self.blob, np.uint8), layout, self.precision)
