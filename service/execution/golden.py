"""Golden outputs: whatever runs a model must give the logits that plain float32 gives for its reference images.

The images and logits are the card's, or, where it names none, made from synthetic images when the model is first
loaded and kept with its batch plan. For another input size they are made when that is first asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import structlog

from service.arrays import Floats
from service.backends.base import Graph, Precision
from service.backends.served import Served, plain_logits
from service.errors import GoldenMismatch, ModelLoadFailed, ReferenceInvalid, ServiceError
from service.execution.reference import Deviation, Reference, synthetic_images, worst

log = structlog.get_logger(component="golden")

# What checking all images may add to a load from the plan cache; where it would take longer, fewer are checked.
RESTORED_SECONDS = 0.05
# For another input size than the model's own: the plain module takes its time for each.
RESIZED_IMAGES = 2
NOT_FINITE = "it gives NaN or infinity; check its weights and the card's mean and std"


@dataclass(slots=True)
class Golden:
    """Checks graphs against `reference`.

    Where that came with the model, `source` is its file and `plain` gives the logits that the model itself, in plain
    float32, has for its images: a reference that even those miss is wrong itself.
    """

    reference: Reference
    source: str = ""
    plain: Callable[[], Floats] | None = None

    def check(self, graph: Graph, size: int, count: int | None = None) -> Deviation:
        """Run `graph`, made for batches of `size`, on all images, or on `count` and as many as fill its batches.

        Raises:
            GoldenMismatch: its logits are too far off for the precision it computes in; the message says how far.
            ReferenceInvalid: so are those of the plain module: the reference is not this model's.
        """
        images = self.reference.images
        # Those whose logits differ most come first: few of them still measure the precision, and not its noise.
        order = np.argsort(-self.reference.ranges, kind="stable").tolist()
        numbers = [order[i % len(order)] for i in range(ceil((count or len(order)) / size) * size)]
        batches = [images[numbers[i : i + size]] for i in range(0, len(numbers), size)]
        logits = np.concatenate([graph.run(0, batch)[0] for batch in batches])
        deviation = self.reference.deviation(logits, numbers)
        if objection := deviation.objection(graph.precision):
            self.require_own_reference()
            raise GoldenMismatch(f"{objection} ({graph.precision}, batches of {size}: {deviation})")
        return deviation

    def check_all(self, graphs: Mapping[int, Graph], alone: Graph | None = None) -> Deviation:
        """Check each of `graphs`, which are by batch size, and that for a lone image, on all images; the worst found.

        Raises:
            GoldenMismatch, ReferenceInvalid: as `check`.
        """
        others = [self.check(alone, 1)] if alone and alone is not graphs.get(1) else []
        return worst([*(self.check(graph, size) for size, graph in graphs.items()), *others])

    def check_restored(self, graphs: Mapping[int, Graph], image_seconds: float) -> Deviation:
        """As `check_all`, for graphs from the plan cache, whose bytes are those that were checked when they were made.

        As many images are tried as `RESTORED_SECONDS` allow, and at least one batch in each graph.

        Raises:
            GoldenMismatch, ReferenceInvalid: as `check`.
        """
        few = max(1, min(len(self.reference.images), int(RESTORED_SECONDS / image_seconds)))
        return worst([self.check(graph, size, few if size == 1 else 1) for size, graph in graphs.items()])

    def require_own_reference(self) -> None:
        """See that what is wrong with a graph is not the reference's fault, or the model's.

        Raises:
            ReferenceInvalid: the plain module does not give these logits either.
        """
        if self.plain is None:
            return
        deviation = self.reference.deviation(self.plain())
        if objection := deviation.objection("float32"):
            raise ReferenceInvalid(
                f"{self.source}: the model itself, in plain float32, does not give the logits of its reference images: "
                f"{objection} ({deviation}); the file and the model's weights, labels or preprocessing do not belong "
                "together: make the file anew, or fetch or import the model again"
            )


@dataclass(slots=True)
class CheckedGraphs:
    """Makes more graphs of a loaded model: in its `precision`, or in float32 where that one's answers are too far off.

    `golden` None checks nothing. A precision that was `forced` is not given up. `notes` says where float32 took over;
    `where` is how they begin.
    """

    model: str
    precision: Precision
    golden: Golden | None
    forced: bool = False
    where: str = ""
    notes: list[str] = field(default_factory=list)

    def graph(self, what: str, size: int, make: Callable[[Precision], Graph]) -> Graph:
        """The graph that `make` gives for batches of `size`, checked; `what` names it in a note.

        Raises:
            GoldenMismatch: float32, or the precision that was forced, is too far off.
            Exception: what `make` raises in float32, or in the precision that was forced.
        """
        try:
            return self._checked(make(self.precision), size)
        except Exception as error:
            if self.forced or self.precision == "float32" or is_of_all_precisions(error):
                raise
            begin = f"{self.where}{what} for batches of {size} computes in float32, not {self.precision}"
            self._note(f"{begin}: {told(error)}")
        return self._checked(make("float32"), size)  # here the first graph's memory is free

    def _checked(self, graph: Graph, size: int) -> Graph:
        if self.golden:
            self.golden.check(graph, size)
        return graph

    def at(self, module: Served, height: int, width: int) -> "CheckedGraphs":
        """The same for images of `height` x `width`, checked with what `module` gives for a few of those.

        Raises:
            ModelLoadFailed: as `computed_reference`.
        """
        golden = Golden(computed_reference(module, height, width, RESIZED_IMAGES))
        return CheckedGraphs(self.model, self.precision, golden, self.forced, f"{height}x{width}: ")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            log.warning("plan_note", model=self.model, note=note)


def computed_reference(module: Served, height: int, width: int, count: int) -> Reference:
    """`count` synthetic images of `height` x `width` and the logits of `module` for them, one image at a time.

    Raises:
        ModelLoadFailed: it gives no finite numbers.
    """
    images = synthetic_images(height, width, count)
    logits = np.concatenate([plain_logits(module, images[i : i + 1]) for i in range(count)])
    if not np.isfinite(logits).all():
        raise ModelLoadFailed(NOT_FINITE)
    return Reference(images, logits)


def is_of_all_precisions(error: Exception) -> bool:
    """Whether it says what is wrong with the model's files, with memory or with a GPU, and not with a precision."""
    return isinstance(error, ServiceError) and not isinstance(error, GoldenMismatch)


def told(error: Exception) -> str:
    """Why a precision is given up."""
    return str(error) if isinstance(error, GoldenMismatch) else f"it failed with {in_words(error)}"


def in_words(error: Exception) -> str:
    """`error` in one line: OpenVINO's have many."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
