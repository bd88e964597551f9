"""A loaded model at one input size: what runs its batches, and what makes more of it when that is first asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.answers.outputs import Head, Outputs
from service.backends.base import Backend, Batch, Graph, Layout, Precision
from service.backends.served import build
from service.errors import ModelLoadFailed
from service.execution.golden import CheckedGraphs
from service.execution.improving import Better, Improving
from service.execution.plan import BatchPlan, batch_seconds
from service.execution.reference import Deviation
from service.execution.tuning import Alone, Tuned
from service.store.store import StoredModel

Pixels = NDArray[np.uint8]  # (height, width, 3)
STAGES = (1, 2, 3, 4)
# Images per batch with stage maps at the most: those of one image are 1.6 MB for a b2, and every batch size has its own
# room for them, twice on a GPU.
MOST_STAGED = 8


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a model was loaded.

    `device` is where it runs, `cpu` or names of GPUs. `notes` says what was tried and left out, and why; `cached`
    whether plan and graphs came from the plan cache. `memory_bytes` is what the memory in use there grew by meanwhile,
    resident memory of the process or memory of the GPUs, with what had been freed given back before and after; at
    least the size of the weights. `deviation` is how far its logits are from the reference's. `device_failure` says
    what befell a GPU meanwhile, after which none is to be expected to work.
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
    device_failure: str = ""


@dataclass(frozen=True, slots=True)
class GraphSet:
    """Graphs by batch size, and the one that has all cores for a lone image, where there is one."""

    graphs: dict[int, Graph]
    alone: Graph | None = None

    def of(self, images: int, *, alone: bool) -> tuple[int, Graph]:
        """The graph that runs so many images, or else the largest, and its batch size."""
        size = min((size for size in self.graphs if size >= images), default=max(self.graphs))
        return size, self.alone if alone and self.alone and size == 1 else self.graphs[size]


class Executable:
    """A loaded model for pictures of one size: runs batches of up to the plan's largest size."""

    def __init__(
        self,
        stored: StoredModel,
        backend: Backend,
        tuned: Tuned,
        report: LoadReport,
        size: tuple[int, int] | None = None,
        *,
        checked: CheckedGraphs | None = None,
        improving: Improving | None = None,
    ) -> None:
        """`size`: height and width of its pictures; the card's by default.

        `checked` makes more graphs for pictures of that size, by default without a check; `improving` makes better
        graphs for them, where the backend can.
        """
        self.stored = stored
        self.card = stored.require_card()
        pixels = self.card.preprocessing
        self.height, self.width = size or (pixels.height, pixels.width)
        self.report = report
        self._backend = backend
        self._layout = tuned.layout
        self._alone = tuned.alone and tuned.alone.layout
        self._improving = improving
        self._checked = checked or CheckedGraphs(stored.id, report.precision, None)
        # Mutable state: the batch plan and the graphs, which `adopt` betters; how to get the graph for a lone image,
        # until `widen` has; those that give stage maps too, and the head's weights, once `add_stages` has made them;
        # and the memory that these took.
        self.plan = tuned.plan
        self._make_alone = tuned.alone and tuned.alone.make
        self._plain = GraphSet(tuned.graphs)
        self._staged: GraphSet | None = None
        self.head: Head | None = None
        self.added_bytes = 0

    def __repr__(self) -> str:
        return f"<Executable {self.stored.id} {self.height}x{self.width} sizes={self.plan.sizes} staged={self.staged}>"

    @property
    def own_size(self) -> bool:
        """Whether its pictures have the size that the card says."""
        return (self.height, self.width) == (self.card.preprocessing.height, self.card.preprocessing.width)

    @property
    def staged(self) -> bool:
        """Whether it can give stage maps."""
        return self._staged is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was tried and left out, and why."""
        return (*self.report.notes, *(self._improving.notes if self._improving else ()), *self._checked.notes)

    @property
    def precisions(self) -> dict[int, Precision]:
        """What the graphs of the batch plan compute in, by batch size."""
        return {size: graph.precision for size, graph in self._plain.graphs.items()}

    @property
    def improving(self) -> Improving | None:
        """What makes better graphs, as long as it has something to do."""
        return self._improving if self._improving and self._improving.size else None

    def improve(self) -> Better | None:
        """Run batches of a size in the better graph that `improving.prepare` led to, if there is one. Blocking."""
        if not (improving := self.improving):
            return None
        before = self._backend.memory_bytes()
        if better := improving.take():
            self.adopt(better)
        self.added_bytes += self._backend.memory_bytes() - before
        return better

    def adopt(self, better: Better) -> None:
        """Run batches of its size in that graph from now on."""
        size, graph, seconds = better
        self._plain = GraphSet({**self._plain.graphs, size: graph}, self._plain.alone)
        self.plan = replace(self.plan, seconds={**self.plan.seconds, size: seconds})

    def widen(self) -> None:
        """Make what the model can do without for its first answers: the graph that has all cores for a lone image."""
        if self._make_alone is None:
            return
        before = self._backend.memory_bytes()
        try:
            graph = self._checked.graph("the lone image's graph", 1, self._lone)
        finally:
            self._make_alone = None  # it holds every graph that was measured
        self._plain = GraphSet(self._plain.graphs, graph)
        # Less, where graphs that were only measured are dropped.
        self.added_bytes += self._backend.memory_bytes() - before

    def add_stages(self) -> None:
        """Make the graphs that give stage maps, and fetch the head's weights. Blocking; takes as long as compiling.

        Raises:
            ModelLoadFailed: the model's files are gone or changed since it was loaded, or can't be compiled.
        """
        if self._staged:
            return
        before = self._backend.memory_bytes()
        module = build(self.card, self.stored.folder, STAGES)
        program = self._backend.program(module, self.height, self.width)
        sizes = [size for size in self.plan.sizes if size <= MOST_STAGED] or [self.plan.sizes[0]]
        make, layout, alone = self._checked.graph, self._layout, self._alone
        graphs = {n: make("the graph with stage maps", n, partial(program.graph, n, layout)) for n in sizes}
        lone = make("the lone image's with stage maps", 1, partial(program.graph, 1, alone)) if alone else None
        self.head = module.head()
        self._staged = GraphSet(graphs, lone)
        self.added_bytes += max(self.card.weights.bytes, self._backend.memory_bytes() - before)

    def resized(self, height: int, width: int) -> "Executable":
        """The same model for pictures of `height` x `width`, in the same precision and layout. Blocking.

        Batches that would hold more pixels than this one's largest are left out.

        Raises:
            ModelLoadFailed: as `add_stages`.
        """
        before = self._backend.memory_bytes()
        layout, report = self._layout, replace(self.report, notes=())
        most = max(1, self.plan.largest * self.height * self.width // (height * width))
        module = build(self.card, self.stored.folder)
        checked = self._checked.at(module, height, width)
        program = self._backend.program(module, height, width)
        graphs: dict[int, Graph] = {}
        seconds: dict[int, float] = {}
        for size in (n for n in self.plan.sizes if n <= most):
            graph = graphs[size] = checked.graph("the graph", size, partial(program.graph, size, layout))
            seconds[size] = _seconds(graph, (size, height, width), layout.streams, self._backend.instances)
        alone = None
        if self._alone:
            lone = checked.graph("the lone image's graph", 1, partial(program.graph, 1, self._alone))
            alone = Alone(self._alone, _seconds(lone, (1, height, width), 1, 1), lambda: lone)
        plan = BatchPlan(seconds, alone.seconds if alone else None)
        tuned = Tuned(report.precision, layout, plan, graphs, alone, ())
        resized = Executable(self.stored, self._backend, tuned, report, (height, width), checked=checked)
        resized.widen()
        resized.added_bytes = max(self.card.weights.bytes, self._backend.memory_bytes() - before)
        return resized

    def run(
        self, instance: int, images: Sequence[Pixels], *, alone: bool = False, stages: bool = False
    ) -> list[Outputs]:
        """The outputs of `images`, in their order; one call at a time for each `instance`.

        `alone` says that nothing else runs, so that one image may have all cores. `stages` asks for stage maps.
        """
        kept = self._staged if stages else self._plain
        if kept is None:
            raise ModelLoadFailed(f"the graphs of {self.stored.id} that give stage maps have not been made")
        outputs: list[Outputs] = []
        while images:  # more than once where no graph of that size gives stage maps
            size, graph = kept.of(len(images), alone=alone)
            part, images = images[:size], images[size:]
            logits, embedding, *maps = graph.run(instance, _stack(part, size, graph.room(instance)))
            outputs += [Outputs(logits[i], embedding[i], tuple(each[i] for each in maps)) for i in range(len(part))]
        return outputs

    def _lone(self, precision: Precision) -> Graph:
        if precision == self.report.precision and self._make_alone:
            return self._make_alone()
        assert self._alone  # noqa: S101  else there is nothing to make
        program = self._backend.program(build(self.card, self.stored.folder), self.height, self.width)
        return program.graph(1, self._alone, precision)


def _seconds(graph: Graph, shape: tuple[int, int, int], streams: int, instances: int) -> float:
    """The time of a batch, as one of `instances` has it: with fewer streams than these, they wait for one another."""
    batch = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return batch_seconds(lambda instance: graph.run(instance, batch), streams) * instances / streams


def _stack(images: Sequence[Pixels], size: int, room: Batch | None) -> Batch:
    """(size, height, width, 3), the places behind the images left black or as they were. In `room`, if there is one.

    One image alone is not copied, unless there is.
    """
    if room is None and len(images) == size == 1:
        return images[0][np.newaxis]
    batch = np.zeros((size, *images[0].shape), dtype=np.uint8) if room is None else room
    np.stack(images, out=batch[: len(images)])
    return batch
