"""From a model in the store to one that can run: module, weights, graphs, batch plan. Blocking; takes seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import psutil
import structlog
from numpy.typing import NDArray

from service.backends.base import Backend, Graph, Layout, Precision
from service.errors import ServiceError
from service.outputs import Outputs
from service.plan import BatchPlan
from service.plan_cache import CachedPlan, Key, PlanCache, digest, machine
from service.reference import Reference, read_reference, synthetic_images
from service.served import build, plain_logits
from service.store import StoredModel
from service.tuning import Alone, Limits, Tuned, Tuning

log = structlog.get_logger(component="loader")

Pixels = NDArray[np.uint8]  # (height, width, 3)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a model was loaded.

    `notes` says what was tried and left out, and why; `cached` whether plan and graphs came from the plan cache.
    `memory_bytes` is what the process's resident memory grew by meanwhile, and at least the size of the weights, since
    growth that fits into memory freed before is not seen.
    """

    backend: str
    precision: Precision
    layout: Layout
    notes: tuple[str, ...]
    cached: bool
    load_seconds: float
    memory_bytes: int


class Executable:
    """A loaded model: runs batches of up to the plan's largest size."""

    def __init__(self, stored: StoredModel, tuned: Tuned, report: LoadReport) -> None:
        self.stored = stored
        self.card = stored.require_card()
        self.plan = tuned.plan
        self.report = report
        self._graphs = tuned.graphs
        self._make_alone = tuned.alone and tuned.alone.make
        # Mutable state: the graph for a lone image, there once `widen` has made it.
        self._alone: Graph | None = None

    def widen(self) -> None:
        """Make what the model can do without for its first answers: the graph that has all cores for a lone image."""
        if self._make_alone:
            graph = self._make_alone()
            graph.run(0, np.zeros((1, *self.shape), np.uint8))  # the first run pays for lazy allocation
            self._alone = graph

    def run(self, instance: int, images: Sequence[Pixels], *, alone: bool = False) -> list[Outputs]:
        """The outputs of `images`, in their order; one call at a time for each `instance`.

        `alone` says that nothing else runs, so that one image may have all cores.
        """
        size = self.plan.padded(len(images))
        graph = self._alone if alone and self._alone and size == 1 else self._graphs[size]
        logits, embedding = graph.run(instance, _stack(images, size))
        return [Outputs(logits[i], embedding[i]) for i in range(len(images))]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.card.preprocessing.height, self.card.preprocessing.width, 3


def load(
    stored: StoredModel, backends: Sequence[Callable[[], Backend]], limits: Limits, cache: PlanCache | None = None
) -> Executable:
    """Load `stored` on the first of `backends` that can run it, as `cache` remembers or else as measured now.

    Raises:
        ModelLoadFailed: the card or the weights are wrong; the message says how.
        Exception: what the last backend raised, where none could run it.
    """
    start, memory = perf_counter(), _resident_bytes()
    card = stored.require_card()
    notes: list[str] = []
    for i, make in enumerate(backends):
        backend = make()
        try:
            tuned, cached = _tuned(stored, backend, limits, cache)
            break
        except ServiceError:
            raise
        except Exception as error:
            if i == len(backends) - 1:
                raise
            notes.append(f"{backend.name} failed: {type(error).__name__}: {error}")
            log.warning("backend_failed", model=stored.id, reason=notes[-1])
    grown = max(card.weights.bytes, _resident_bytes() - memory)
    said = (*notes, *tuned.notes)
    for note in () if cached else tuned.notes:
        log.warning("plan_note", model=stored.id, note=note)
    seconds = perf_counter() - start
    report = LoadReport(backend.name, tuned.precision, tuned.layout, said, cached, seconds, grown)
    return Executable(stored, tuned, report)


def _tuned(stored: StoredModel, backend: Backend, limits: Limits, cache: PlanCache | None) -> tuple[Tuned, bool]:
    """Graphs and plan, and whether the cache had them."""
    key = _key(stored, backend, limits)
    if cache and (restored := _restored(stored, backend, cache, key)):
        return restored, True
    tuned = _measured(stored, backend, limits)
    blobs = {size: graph.export() for size, graph in tuned.graphs.items()} if cache else {}
    whole = {size: blob for size, blob in blobs.items() if blob is not None}
    if cache and whole and len(whole) == len(blobs):
        entry = CachedPlan(
            key=dict(key),
            precision=tuned.precision,
            layout=tuned.layout,
            seconds=dict(tuned.plan.seconds),
            alone_seconds=tuned.plan.alone_seconds,
            alone_layout=tuned.alone.layout if tuned.alone else None,
            notes=tuned.notes,
            graphs={size: digest(blob) for size, blob in whole.items()},
        )
        cache.write(stored.id, stored.version, entry, whole)
    return tuned, False


def _restored(stored: StoredModel, backend: Backend, cache: PlanCache, key: Key) -> Tuned | None:
    if not (found := cache.read(stored.id, stored.version, key)):
        return None
    entry, paths = found
    blobs = {size: np.memmap(path, np.uint8, "r") for size, path in paths.items()}
    try:
        graphs = {size: backend.restore(blob, entry.layout, entry.precision) for size, blob in blobs.items()}
        pixels = stored.require_card().preprocessing
        for size, graph in graphs.items():  # the first run pays for lazy allocation, and shows that it runs
            graph.run(0, np.zeros((size, pixels.height, pixels.width, 3), np.uint8))
    except Exception as error:  # noqa: BLE001  whatever is wrong with it, it can be made anew
        log.warning("plan_cache_ignored", model=stored.id, reason=f"{type(error).__name__}: {error}")
        return None
    alone = None
    if (layout := entry.alone_layout) and entry.alone_seconds:
        alone = Alone(layout, entry.alone_seconds, lambda: backend.restore(blobs[1], layout, entry.precision))
    plan = BatchPlan(entry.seconds, entry.alone_seconds)
    return Tuned(entry.precision, entry.layout, plan, graphs, alone, entry.notes)


def _measured(stored: StoredModel, backend: Backend, limits: Limits) -> Tuned:
    card = stored.require_card()
    pixels = card.preprocessing
    module = build(card, stored.folder)

    def reference() -> Reference:
        if found := read_reference(card, stored.folder):
            return found
        images = synthetic_images(pixels.height, pixels.width)
        return Reference(images, plain_logits(module, images))

    program = backend.program(module, pixels.height, pixels.width)
    return Tuning(backend, program, reference, (pixels.height, pixels.width), limits).run()


def _key(stored: StoredModel, backend: Backend, limits: Limits) -> dict[str, str]:
    """All that plan and graphs depend on."""
    card = stored.require_card()
    pixels = card.preprocessing
    return {
        "weights": card.weights.sha256,
        "card": digest(card.model_dump_json().encode()),
        "input": f"{pixels.height}x{pixels.width}",
        "backend": f"{backend.name} {backend.version}",
        "instances": str(backend.instances),
        "cores": str(limits.cores),
        "max_batch_size": str(limits.max_batch_size),
        "precision": limits.precision or "auto",
        **machine(),
    }


def _stack(images: Sequence[Pixels], size: int) -> NDArray[np.uint8]:
    """(size, height, width, 3), the places behind the images left black. One image alone is not copied."""
    if len(images) == size == 1:
        return images[0][np.newaxis]
    batch = np.zeros((size, *images[0].shape), dtype=np.uint8)
    np.stack(images, out=batch[: len(images)])
    return batch


def _resident_bytes() -> int:
    resident: int = psutil.Process().memory_info().rss
    return resident
