"""From a model in the store to one that can run: module, weights, graphs, batch plan. Blocking; takes seconds."""

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import structlog

from service.backends.base import Backend
from service.errors import ServiceError
from service.executable import Executable, LoadReport
from service.memory import resident_bytes
from service.plan import BatchPlan
from service.plan_cache import CachedPlan, Key, PlanCache, digest, machine
from service.reference import Reference, read_reference, synthetic_images
from service.served import build, plain_logits
from service.store import StoredModel
from service.tuning import Alone, Limits, Tuned, Tuning

log = structlog.get_logger(component="loader")


def load(
    stored: StoredModel, backends: Sequence[Callable[[], Backend]], limits: Limits, cache: PlanCache | None = None
) -> Executable:
    """Load `stored` on the first of `backends` that can run it, as `cache` remembers or else as measured now.

    Raises:
        ModelLoadFailed: the card or the weights are wrong; the message says how.
        Exception: what the last backend raised, where none could run it.
    """
    start, memory = perf_counter(), resident_bytes()
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
    grown = max(card.weights.bytes, resident_bytes() - memory)
    said = (*notes, *tuned.notes)
    for note in () if cached else tuned.notes:
        log.warning("plan_note", model=stored.id, note=note)
    seconds = perf_counter() - start
    report = LoadReport(backend.name, tuned.precision, tuned.layout, said, cached, seconds, grown)
    return Executable(stored, backend, tuned, report)


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
