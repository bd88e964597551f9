"""A loaded model at one input size: it runs batches, and makes more graphs when they are first needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import structlog

from service.backends.base import Backend, Graph, Layout, Precision, build
from service.errors import MemoryExhausted, ModelLoadFailed, ServiceError
from service.execution.plan import BatchPlan
from service.execution.plan_cache import PORTABLE, PortablePlan
from service.execution.reference import Deviation, ReferenceCheck, computed_reference, concerns_precision, reason
from service.execution.tuning import (
    LatencyGraph,
    OptimizedGraph,
    Optimizer,
    Reserve,
    Tuned,
    graph_seconds,
    unlimited,
)
from service.results import Head, ImageResult, InferenceResult, Outputs, Pixels
from service.store.store import StoredModel

log = structlog.get_logger(component="executable")

STAGES = (1, 2, 3, 4)
# The largest batch with stage maps. Those of one image are 1.6 MB for a b2, and each batch size has memory for its own,
# twice on a GPU.
MAX_STAGED = 8
# The plain module computes the reference logits for another input size, and takes its time for each image.
RESIZED_IMAGES = 2


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a model was loaded.

    `device` is `cpu` or names of GPUs. `notes` says what was left out, and why; `cached` whether plan and graphs came
    from the plan cache. `memory_bytes` is what the load took on the device, at least the size of the weights.
    `steps` has the seconds of `read`, `compile`, `check` and, for the plan cache, `write`.
    """

    backend: str
    device: str
    precision: Precision
    layout: Layout
    notes: tuple[str, ...]
    cached: bool
    load_seconds: float
    memory_bytes: int
    deviation: Deviation | None = None
    steps: Mapping[str, float] = field(default_factory=dict)
    # All that the plan depends on, and whether it was imported.
    key: Mapping[str, str] = field(default_factory=dict)
    pinned: bool = False


# Graphs by batch size, and the latency graph, where there is one: it runs an image that is alone on all cores.
GraphSet = tuple[dict[int, Graph], Graph | None]


@dataclass(slots=True)
class CheckedGraphs:
    """Makes more graphs of a loaded model, in its `precision`, or in float32 where that one's logits are too far off.

    Without a `reference_check` none is checked. A precision that was `forced` is never replaced; `notes`, which begin
    with `prefix`, say where one was.
    """

    model: str
    precision: Precision
    reference_check: ReferenceCheck | None
    forced: bool = False
    prefix: str = ""
    notes: list[str] = field(default_factory=list)

    def fitting(self, name: str, sizes: Sequence[int], pixels: int, reserve: Reserve) -> Iterator[int]:
        """`sizes` for as long as there is memory for their graphs; for the first there is."""
        for size in sizes:
            if size != sizes[0] and not self.fits(name, size, pixels, reserve):
                return
            yield size

    def fits(self, name: str, size: int, pixels: int, reserve: Reserve) -> bool:
        """Whether there is memory for a graph for batches of `size` images of `pixels` each; a note says where not."""
        try:
            reserve(size * pixels)
        except MemoryExhausted as error:
            self._note(f"{self.prefix}{name} for batches of {size} is left out: {error}")
            return False
        return True

    def graph(self, name: str, size: int, make: Callable[[Precision], Graph]) -> Graph:
        """The graph that `make` returns for batches of `size`, checked; raises what fails in the last precision."""
        try:
            return self._check(make(self.precision), size)
        except Exception as error:
            if self.forced or self.precision == "float32" or not concerns_precision(error):
                raise
            which = f"{self.prefix}{name} for batches of {size}"
            note = f"{which} computes in float32, not {self.precision}: {reason(error)}"
        self._note(note)
        return self._check(make("float32"), size)  # by here the first graph's memory is free

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            log.warning("plan_note", model=self.model, note=note)

    def _check(self, graph: Graph, size: int) -> Graph:
        if self.reference_check:
            self.reference_check.check(graph, size)
        return graph


class Executable:
    """A loaded model for images of one size: runs batches of up to the plan's largest size."""

    def __init__(
        self,
        stored: StoredModel,
        backend: Backend,
        tuned: Tuned,
        report: LoadReport,
        size: tuple[int, int] | None = None,
        *,
        checked: CheckedGraphs | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        """`size` is the height and width of its images, the card's by default; `checked` makes more graphs for them."""
        self.stored = stored
        self.card = stored.require_card()
        own = self.card.preprocessing.height, self.card.preprocessing.width
        self.height, self.width = size or own
        self.own_size = (self.height, self.width) == own
        self.report = report
        self._backend = backend
        self._layout = tuned.layout
        self._latency_layout = tuned.latency.layout if tuned.latency else None
        self._optimizer = optimizer
        self._checked = checked or CheckedGraphs(stored.id, report.precision, None)
        # Mutable state: the batch plan and its graphs; what makes the latency graph, until it is made; the graphs with
        # stage maps and the head's weights, once `add_stages` has made them; and the memory that all of these took.
        self.plan = tuned.plan
        self._make_latency = tuned.latency and tuned.latency.make
        self._plain: GraphSet = tuned.graphs, None
        self.staged: GraphSet | None = None
        self.head: Head | None = None
        self.added_bytes = 0

    def __repr__(self) -> str:
        return f"<Executable {self.stored.id} {self.height}x{self.width} sizes={self.plan.sizes}>"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was tried and left out, and why."""
        return (*self.report.notes, *(self._optimizer.notes if self._optimizer else ()), *self._checked.notes)

    @property
    def precisions(self) -> dict[int, Precision]:
        """What the graphs of the batch plan compute in, by batch size."""
        return {size: graph.precision for size, graph in self._plain[0].items()}

    @property
    def optimizer(self) -> Optimizer | None:
        """What makes faster graphs, until it has nothing left to do."""
        return self._optimizer if self._optimizer and self._optimizer.size else None

    def run(
        self,
        instance: int,
        images: Sequence[Pixels],
        *,
        alone: bool = False,
        stages: bool = False,
        ran: Callable[[int, int, float], None] = lambda *_: None,
    ) -> list[Outputs]:
        """The outputs of `images`, in their order. Each `instance` makes one call at a time.

        `alone` says that nothing else runs, so that one image may have all cores. `stages` adds stage maps. `ran` is
        called after each run of a graph, with the size that it was compiled for, its images and its seconds.
        """
        chosen = self.staged if stages else self._plain
        if chosen is None:
            raise ModelLoadFailed(f"the graphs of {self.stored.id} with stage maps have not been made")
        (graphs, latency), has_head = chosen, bool(self.card.labels)
        outputs: list[Outputs] = []
        while images:  # more than once where no graph with stage maps is that large
            size = min((size for size in graphs if size >= len(images)), default=max(graphs))
            graph = latency if alone and latency and size == 1 else graphs[size]
            part, images = images[:size], images[size:]
            start = perf_counter()
            found = graph.run(instance, part)
            ran(size, len(part), perf_counter() - start)
            logits, embedding, *maps = found if has_head else (found[0][:, :0], *found)
            outputs += [Outputs(logits[i], embedding[i], tuple(each[i] for each in maps)) for i in range(len(part))]
        return outputs

    def portable_plan(self) -> PortablePlan:
        """Its plan, for replicas."""
        alone, key = self.plan.alone_seconds, self.report.key
        return PortablePlan(
            model=self.stored.id,
            version=self.stored.version,
            requires={name: key[name] for name in PORTABLE},
            measured_on=key["cpu"],
            precision=self.report.precision,
            layout=self._layout,
            seconds=dict(self.plan.seconds),
            alone_seconds=alone,
            alone_layout=self._latency_layout if alone else None,
        )

    @property
    def _graphs(self) -> list[tuple[int, Graph]]:
        """Every graph that serves, with its batch size."""
        sets = [each for each in (self._plain, self.staged) if each]
        return [pair for graphs, alone in sets for pair in (*graphs.items(), *([(1, alone)] if alone else []))]

    def wrong(self, instance: int, turn: int) -> str | None:
        """Run one of its graphs, by `turn`, on the reference image that tells most; why its logits are wrong, if so.

        They may be off by what the load allows the graph's precision. None without reference logits.
        """
        if not (check := self._checked.reference_check):
            return None
        size, graph = self._graphs[turn % len(self._graphs)]
        deviation = check.measure(graph, size, 1, instance)
        objection = deviation.objection(graph.precision)
        return objection and f"{objection} ({graph.precision}, batches of {size}: {deviation})"

    def result(
        self, results: list[ImageResult | ServiceError], *, stages: bool, load_seconds: float
    ) -> InferenceResult:
        """The `results` of this model's images as one, with the head's weights if they have `stages`."""
        head = self.head if stages else None
        return InferenceResult(self.card, self.stored.version, (self.height, self.width), head, results, load_seconds)

    def optimize(self) -> OptimizedGraph | None:
        """Make the graph that `optimizer.prepare` has prepared, and run batches of its size in it if it is faster."""
        with self._memory_counted():
            if optimized := self._optimizer.make() if self._optimizer else None:
                self.swap_graph(optimized)
        return optimized

    def swap_graph(self, optimized: OptimizedGraph) -> None:
        """Run batches of its size in that graph from now on."""
        size, graph, seconds = optimized
        graphs, latency = self._plain
        self._plain = {**graphs, size: graph}, latency
        self.plan = replace(self.plan, seconds={**self.plan.seconds, size: seconds})

    def add_latency_graph(self) -> None:
        """Make the latency graph, which the first responses can do without. Blocking."""
        if self._make_latency is None:
            return
        with self._memory_counted():  # it may shrink: graphs that were only measured are freed
            try:
                graph = self._checked.graph("the latency graph", 1, self._latency_graph)
            finally:
                self._make_latency = None  # it refers to every graph that was measured
            self._plain = self._plain[0], graph

    def _latency_graph(self, precision: Precision) -> Graph:
        if precision == self.report.precision and self._make_latency:
            return self._make_latency()
        assert self._latency_layout  # noqa: S101  else there is nothing to make
        program = self._backend.program(build(self.card, self.stored.folder), self.height, self.width)
        return program.graph(1, self._latency_layout, precision)

    def add_stages(self, reserve: Reserve = unlimited) -> None:
        """Make the graphs that return stage maps, and fetch the head's weights. Blocking; it compiles.

        `reserve` is called before each graph but the first is made, which is left out where it raises. Raises
        ModelLoadFailed if the model's files are gone, have changed since the load, or can't be compiled.
        """
        if self.staged:
            return
        with self._memory_counted(least=self.card.weights.bytes):
            module = build(self.card, self.stored.folder, STAGES)
            program = self._backend.program(module, self.height, self.width)
            sizes = [size for size in self.plan.sizes if size <= MAX_STAGED] or [self.plan.sizes[0]]
            make, layout, alone = self._checked.graph, self._layout, self._latency_layout
            name, latency, pixels = "the graph with stage maps", None, self.height * self.width
            fitting = self._checked.fitting(name, sizes, pixels, reserve)
            graphs = {n: make(name, n, partial(program.graph, n, layout)) for n in fitting}
            if alone and self._checked.fits(name := "the latency graph with stage maps", 1, pixels, reserve):
                latency = make(name, 1, partial(program.graph, 1, alone))
            self.head = module.head()
            self.staged = graphs, latency

    def resized(self, height: int, width: int, reserve: Reserve = unlimited) -> "Executable":
        """The same model for images of `height` x `width`, in the same precision and layout. Blocking.

        Batch sizes with more pixels than this one's largest are left out. `reserve`, and what is raised: as
        `add_stages`.
        """
        before = self._backend.memory_bytes()
        module = build(self.card, self.stored.folder)
        check = ReferenceCheck(computed_reference(module, height, width, RESIZED_IMAGES))
        checked = replace(self._checked, reference_check=check, prefix=f"{height}x{width}: ", notes=[])
        program, instances = self._backend.program(module, height, width), self._backend.instances

        def measured(name: str, n: int, layout: Layout, instances: int) -> tuple[Graph, float]:
            graph = checked.graph(name, n, partial(program.graph, n, layout))
            # With fewer streams than instances, instances wait for one another.
            return graph, graph_seconds(graph, n, (height, width), layout.streams) * instances / layout.streams

        latency, pixels = None, height * width
        most = max(1, self.plan.largest * self.height * self.width // pixels)
        sizes = [n for n in self.plan.sizes if n <= most]
        fitting = checked.fitting("the graph", sizes, pixels, reserve)
        graphs = {n: measured("the graph", n, self._layout, instances) for n in fitting}
        if self._latency_layout and checked.fits("the latency graph", 1, pixels, reserve):
            graph, seconds = measured("the latency graph", 1, self._latency_layout, 1)
            latency = LatencyGraph(self._latency_layout, seconds, lambda: graph)
        plan = BatchPlan({n: seconds for n, (_, seconds) in graphs.items()}, latency.seconds if latency else None)
        plain = {n: graph for n, (graph, _) in graphs.items()}
        tuned = Tuned(checked.precision, self._layout, plan, plain, latency, ())
        report = replace(self.report, notes=())
        resized = Executable(self.stored, self._backend, tuned, report, (height, width), checked=checked)
        resized.add_latency_graph()
        resized.added_bytes = max(self.card.weights.bytes, self._backend.memory_bytes() - before)
        return resized

    @contextmanager
    def _memory_counted(self, least: int | None = None) -> Iterator[None]:
        """Add to `added_bytes` what the block takes, and at least `least`."""
        before = self._backend.memory_bytes()
        yield
        taken = self._backend.memory_bytes() - before
        self.added_bytes += taken if least is None else max(least, taken)
