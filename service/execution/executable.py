"""A loaded model at one input size: it runs batches, and makes more graphs when they are first needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import structlog

from service.backends.base import Backend, Batch, Graph, Layout, Precision, Program
from service.backends.module import Served, build
from service.errors import ModelLoadFailed
from service.execution.optimizer import OptimizedGraph, Optimizer
from service.execution.plan import BatchPlan
from service.execution.reference import Deviation, ReferenceCheck, computed_reference, is_of_all_precisions, reason
from service.execution.tuning import LatencyGraph, Tuned, graph_seconds
from service.results import Head, Outputs, Pixels
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

    `device` is `cpu` or names of GPUs. `notes` says what was tried and left out, and why; `cached` whether plan and
    graphs came from the plan cache. `memory_bytes` is by how much the load raised the memory in use on the device
    (resident memory of the process, or memory of the GPUs), free memory returned before and after; at least the size
    of the weights. `deviation` is how far the model's logits are from the reference.
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


@dataclass(frozen=True, slots=True)
class GraphSet:
    """Graphs by batch size, and the latency graph, where there is one: it runs an image that is alone on all cores."""

    graphs: dict[int, Graph]
    latency: Graph | None = None

    def choose(self, images: int, *, alone: bool) -> tuple[int, Graph]:
        """The graph that runs `images` images, else the largest, and its batch size."""
        size = min((size for size in self.graphs if size >= images), default=max(self.graphs))
        return size, self.latency if alone and self.latency and size == 1 else self.graphs[size]


@dataclass(slots=True)
class CheckedGraphs:
    """Makes more graphs of a loaded model, in its `precision`, or in float32 where that one's logits are too far off.

    Without a `reference_check` none is checked. A precision that was `forced` is never replaced. `notes` says where
    float32 replaced it; they begin with `prefix`.
    """

    model: str
    precision: Precision
    reference_check: ReferenceCheck | None
    forced: bool = False
    prefix: str = ""
    notes: list[str] = field(default_factory=list)

    def graph(self, name: str, size: int, make: Callable[[Precision], Graph]) -> Graph:
        """The graph that `make` returns for batches of `size`, checked; `name` is for the note.

        Raises:
            GoldenMismatch: float32, or the forced precision, is too far off.
            Exception: what `make` raises in float32, or in the forced precision.
        """
        try:
            return self._check(make(self.precision), size)
        except Exception as error:
            if self.forced or self.precision == "float32" or is_of_all_precisions(error):
                raise
            changed = f"{name} for batches of {size} computes in float32, not {self.precision}"
            note = f"{self.prefix}{changed}: {reason(error)}"
        if note not in self.notes:
            self.notes.append(note)
            log.warning("plan_note", model=self.model, note=note)
        return self._check(make("float32"), size)  # by here the first graph's memory is free

    def _check(self, graph: Graph, size: int) -> Graph:
        if self.reference_check:
            self.reference_check.check(graph, size)
        return graph

    def resized(self, module: Served, height: int, width: int) -> "CheckedGraphs":
        """The same for images of `height` x `width`; the reference is what `module` computes for a few of them.

        Raises:
            ModelLoadFailed: as `computed_reference`.
        """
        check = ReferenceCheck(computed_reference(module, height, width, RESIZED_IMAGES))
        return CheckedGraphs(self.model, self.precision, check, self.forced, f"{height}x{width}: ")


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
        """`size` is the height and width of its images, the card's by default.

        `checked` makes more graphs for images of that size, by default without a check; `optimizer` makes faster ones,
        where the backend can.
        """
        self.stored = stored
        self.card = stored.require_card()
        pixels = self.card.preprocessing
        self.height, self.width = size or (pixels.height, pixels.width)
        self.report = report
        self._backend = backend
        self._layout = tuned.layout
        self._latency_layout = tuned.latency and tuned.latency.layout
        self._optimizer = optimizer
        self._checked = checked or CheckedGraphs(stored.id, report.precision, None)
        # Mutable state: the batch plan and its graphs, which `swap_graph` changes; what makes the latency graph, until
        # `add_latency_graph` has called it; the graphs with stage maps and the head's weights, once `add_stages` has
        # made them; and the memory that all of these took.
        self.plan = tuned.plan
        self._make_latency = tuned.latency and tuned.latency.make
        self._plain = GraphSet(tuned.graphs)
        self._staged: GraphSet | None = None
        self.head: Head | None = None
        self.added_bytes = 0

    def __repr__(self) -> str:
        return f"<Executable {self.stored.id} {self.height}x{self.width} sizes={self.plan.sizes} staged={self.staged}>"

    @property
    def own_size(self) -> bool:
        """Whether its images have the size that the card names."""
        return (self.height, self.width) == (self.card.preprocessing.height, self.card.preprocessing.width)

    @property
    def staged(self) -> bool:
        """Whether it can return stage maps."""
        return self._staged is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was tried and left out, and why."""
        return (*self.report.notes, *(self._optimizer.notes if self._optimizer else ()), *self._checked.notes)

    @property
    def precisions(self) -> dict[int, Precision]:
        """What the graphs of the batch plan compute in, by batch size."""
        return {size: graph.precision for size, graph in self._plain.graphs.items()}

    @property
    def optimizer(self) -> Optimizer | None:
        """What makes faster graphs, until it has nothing left to do."""
        return self._optimizer if self._optimizer and self._optimizer.size else None

    def optimize(self) -> OptimizedGraph | None:
        """Make the graph that `optimizer.prepare` has prepared, and run batches of its size in it if it is faster."""
        if not (optimizer := self.optimizer):
            return None
        with self._memory_counted():
            if optimized := optimizer.make():
                self.swap_graph(optimized)
        return optimized

    def swap_graph(self, optimized: OptimizedGraph) -> None:
        """Run batches of its size in that graph from now on."""
        size, graph, seconds = optimized
        self._plain = GraphSet({**self._plain.graphs, size: graph}, self._plain.latency)
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
            self._plain = GraphSet(self._plain.graphs, graph)

    def add_stages(self) -> None:
        """Make the graphs that return stage maps, and fetch the head's weights. Blocking; it compiles.

        Raises:
            ModelLoadFailed: the model's files are gone, have changed since the load, or can't be compiled.
        """
        if self._staged:
            return
        before = self._backend.memory_bytes()
        module = build(self.card, self.stored.folder, STAGES)
        program = self._backend.program(module, self.height, self.width)
        sizes = [size for size in self.plan.sizes if size <= MAX_STAGED] or [self.plan.sizes[0]]
        make, layout, alone = self._checked.graph, self._layout, self._latency_layout
        graphs = {n: make("the graph with stage maps", n, partial(program.graph, n, layout)) for n in sizes}
        latency = make("the latency graph with stage maps", 1, partial(program.graph, 1, alone)) if alone else None
        self.head = module.head()
        self._staged = GraphSet(graphs, latency)
        self.added_bytes += max(self.card.weights.bytes, self._backend.memory_bytes() - before)

    def resized(self, height: int, width: int) -> "Executable":
        """The same model for images of `height` x `width`, in the same precision and layout. Blocking.

        Batch sizes with more pixels than this one's largest are left out.

        Raises:
            ModelLoadFailed: as `add_stages`.
        """
        before = self._backend.memory_bytes()
        module = build(self.card, self.stored.folder)
        checked = self._checked.resized(module, height, width)
        tuned = self._retuned(checked, self._backend.program(module, height, width), (height, width))
        report = replace(self.report, notes=())
        resized = Executable(self.stored, self._backend, tuned, report, (height, width), checked=checked)
        resized.add_latency_graph()
        resized.added_bytes = max(self.card.weights.bytes, self._backend.memory_bytes() - before)
        return resized

    def _retuned(self, checked: CheckedGraphs, program: Program, size: tuple[int, int]) -> Tuned:
        """The graphs of `program` for images of that height and width, and their times."""

        def made(name: str, batch: int, layout: Layout, instances: int) -> tuple[Graph, float]:
            graph = checked.graph(name, batch, partial(program.graph, batch, layout))
            # With fewer streams than instances, instances wait for one another.
            return graph, graph_seconds(graph, batch, size, layout.streams) * instances / layout.streams

        most = max(1, self.plan.largest * self.height * self.width // (size[0] * size[1]))
        layout, instances = self._layout, self._backend.instances
        graphs = {n: made("the graph", n, layout, instances) for n in self.plan.sizes if n <= most}
        latency = None
        if self._latency_layout:
            graph, seconds = made("the latency graph", 1, self._latency_layout, 1)
            latency = LatencyGraph(self._latency_layout, seconds, lambda: graph)
        plan = BatchPlan({n: seconds for n, (_, seconds) in graphs.items()}, latency.seconds if latency else None)
        return Tuned(self.report.precision, layout, plan, {n: each for n, (each, _) in graphs.items()}, latency, ())

    def run(
        self, instance: int, images: Sequence[Pixels], *, alone: bool = False, stages: bool = False
    ) -> list[Outputs]:
        """The outputs of `images`, in their order. Each `instance` makes one call at a time.

        `alone` says that nothing else runs, so that one image may have all cores. `stages` adds stage maps.
        """
        graphs = self._staged if stages else self._plain
        if graphs is None:
            raise ModelLoadFailed(f"the graphs of {self.stored.id} with stage maps have not been made")
        outputs: list[Outputs] = []
        while images:  # more than once where no graph with stage maps is that large
            size, graph = graphs.choose(len(images), alone=alone)
            part, images = images[:size], images[size:]
            logits, embedding, *maps = graph.run(instance, _stack(part, size, graph.input_buffer(instance)))
            outputs += [Outputs(logits[i], embedding[i], tuple(each[i] for each in maps)) for i in range(len(part))]
        return outputs

    def _latency_graph(self, precision: Precision) -> Graph:
        if precision == self.report.precision and self._make_latency:
            return self._make_latency()
        assert self._latency_layout  # noqa: S101  else there is nothing to make
        program = self._backend.program(build(self.card, self.stored.folder), self.height, self.width)
        return program.graph(1, self._latency_layout, precision)

    @contextmanager
    def _memory_counted(self) -> Iterator[None]:
        before = self._backend.memory_bytes()
        yield
        self.added_bytes += self._backend.memory_bytes() - before


def _stack(images: Sequence[Pixels], size: int, buffer: Batch | None) -> Batch:
    """A batch (size, height, width, 3), in `buffer` if there is one; rows after the images are not cleared there.

    One image is not copied, unless there is a buffer.
    """
    if buffer is None and len(images) == size == 1:
        return images[0][np.newaxis]
    batch = np.zeros((size, *images[0].shape), dtype=np.uint8) if buffer is None else buffer
    np.stack(images, out=batch[: len(images)])
    return batch
