"""From a model in the store to one that can run: module, weights, graphs, batch plan. Blocking; takes seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
import structlog

from service.backends.base import Backend, Graph, Layout
from service.backends.served import build, plain_logits
from service.errors import DeviceFailed, GoldenMismatch, OutOfMemory, ReferenceInvalid, ServiceError
from service.execution.executable import Executable, LoadReport
from service.execution.golden import CheckedGraphs, Golden, computed_reference
from service.execution.improving import Improving
from service.execution.plan import BatchPlan
from service.execution.plan_cache import CachedPlan, Key, PlanCache, digest, machine
from service.execution.reference import SYNTHETIC, Reference, packed, read_reference, reference_of
from service.execution.tuning import Alone, Limits, Tuned, Tuning
from service.store.store import StoredModel

log = structlog.get_logger(component="loader")


def load(
    stored: StoredModel, backends: Sequence[Callable[[], Backend]], limits: Limits, cache: PlanCache | None = None
) -> Executable:
    """Load `stored` on the first of `backends` that can run it, as `cache` remembers or else as measured now.

    A backend that does not give the logits of the model's reference images counts as one that can't run it.

    Raises:
        ModelLoadFailed: the card or the weights are wrong, or what they make is; the message says how.
        Exception: what the last backend raised, where none could run it.
    """
    start = perf_counter()
    card = stored.require_card()
    backend, memory, ready, failed = _first_that_can(stored, backends, limits, cache)
    tuned = ready.tuned
    for note in () if ready.cached else tuned.notes:
        log.warning("plan_note", model=stored.id, note=note)
    grown = max(card.weights.bytes, backend.memory_bytes() - memory)
    report = LoadReport(
        backend=backend.name,
        device=backend.device,
        precision=tuned.precision,
        layout=tuned.layout,
        notes=(*failed.notes, *tuned.notes),
        cached=ready.cached,
        load_seconds=perf_counter() - start,
        memory_bytes=grown,
        deviation=tuned.deviation,
        device_failure=failed.device,
    )
    checked = CheckedGraphs(stored.id, tuned.precision, ready.golden, forced=limits.precision is not None)
    return Executable(stored, backend, tuned, report, checked=checked, improving=ready.improving)


@dataclass(frozen=True, slots=True)
class _Ready:
    """Graphs and plan, whether the cache had them, what their logits are held against, and how to make better ones."""

    tuned: Tuned
    cached: bool
    golden: Golden
    improving: Improving | None = None


@dataclass(slots=True)
class _Failed:
    """How the backends before failed, in words; and what befell a GPU, if it does not work any more."""

    notes: list[str] = field(default_factory=list)
    device: str = ""


def _first_that_can(
    stored: StoredModel, backends: Sequence[Callable[[], Backend]], limits: Limits, cache: PlanCache | None
) -> tuple[Backend, int, _Ready, _Failed]:
    """The first backend on which `stored` runs, its memory before, what runs there, and how those before it failed."""
    failed = _Failed()
    for i, make in enumerate(backends, 1):
        name = f"backend number {i}"
        try:
            backend = make()
            name = backend.name if backend.device == "cpu" else f"{backend.name} on {backend.device}"
            memory = backend.memory_bytes()  # its libraries are not the model's memory
            return backend, memory, _tuned(stored, backend, limits, cache), failed
        except Exception as error:
            wrong = isinstance(error, GoldenMismatch)
            # What is wrong with the model's files is so on every backend.
            if isinstance(error, ServiceError) and not isinstance(error, GoldenMismatch | OutOfMemory | DeviceFailed):
                raise
            failed.notes.append(f"{name} failed: {error if wrong else f'{type(error).__name__}: {error}'}")
            if isinstance(error, DeviceFailed):
                failed.device = str(error)
            if i == len(backends):
                if wrong:
                    raise _mismatch(stored, failed.notes, limits) from error
                raise
            log.warning("backend_failed", model=stored.id, reason=failed.notes[-1])
    raise ValueError("no backend to load on")


def _mismatch(stored: StoredModel, failures: Sequence[str], limits: Limits) -> GoldenMismatch:
    """Its own module gives the logits, or `Golden` would have found its reference at fault."""
    forced = limits.precision not in {None, "float32"}
    advice = "set PVT_PRECISION=auto" if forced else "try another PVT_BACKEND, or other versions of openvino and torch"
    return GoldenMismatch(
        f"{stored.key} does not give the logits of its reference images, so it is not served: {'; '.join(failures)}; "
        f"its plain float32 module does give them: {advice}"
    )


def _tuned(stored: StoredModel, backend: Backend, limits: Limits, cache: PlanCache | None) -> _Ready:
    """As the cache remembers, or else as measured now, and kept then; checked both times."""
    key = _key(stored, backend, limits)
    own = reference_of(stored.require_card(), stored.folder)
    cache = cache if backend.exports else None
    if cache and (restored := _restored(stored, backend, cache, key, own)):
        return restored
    ready = _measured(stored, backend, limits, own)
    if cache:
        _keep(stored, cache, key, ready.tuned, None if own else ready.golden.reference)
    return ready


def _keep(stored: StoredModel, cache: PlanCache, key: Key, tuned: Tuned, computed: Reference | None) -> None:
    """Write what was measured to the cache, with the reference, if that was computed."""
    blobs = {size: graph.export() for size, graph in tuned.graphs.items()}
    whole = {size: blob for size, blob in blobs.items() if blob is not None}
    if len(whole) < len(blobs):
        return
    reference = packed(computed) if computed else None
    entry = CachedPlan(
        key=dict(key),
        precision=tuned.precision,
        layout=tuned.layout,
        seconds=dict(tuned.plan.seconds),
        alone_seconds=tuned.plan.alone_seconds,
        alone_layout=tuned.alone.layout if tuned.alone else None,
        notes=tuned.notes,
        graphs={size: digest(blob) for size, blob in whole.items()},
        reference=reference and reference[1],
    )
    cache.write(stored.id, stored.version, entry, whole, {reference[1].file: reference[0]} if reference else {})


def _restored(
    stored: StoredModel, backend: Backend, cache: PlanCache, key: Key, own: Reference | None
) -> _Ready | None:
    if not (found := cache.read(stored.id, stored.version, key)):
        return None
    entry, paths = found
    blobs = {size: np.memmap(path, np.uint8, "r") for size, path in paths.items()}
    try:
        graphs = {size: backend.restore(blob, entry.layout, entry.precision) for size, blob in blobs.items()}
        tuned = _of_entry(entry, graphs, lambda layout: backend.restore(blobs[1], layout, entry.precision))
        golden = _golden(stored, own) if own else Golden(_kept_reference(stored, cache, entry))
        deviation = golden.check_restored(graphs, tuned.plan.time(1))
        return _Ready(replace(tuned, deviation=deviation), cached=True, golden=golden)
    except Exception as error:  # noqa: BLE001  whatever is wrong with it, it can be made anew
        log.warning("plan_cache_ignored", model=stored.id, reason=f"{type(error).__name__}: {error}")
        return None


def _of_entry(entry: CachedPlan, graphs: dict[int, Graph], make: Callable[[Layout], Graph]) -> Tuned:
    alone = None
    if (layout := entry.alone_layout) and entry.alone_seconds:
        alone = Alone(layout, entry.alone_seconds, lambda: make(layout))
    plan = BatchPlan(entry.seconds, entry.alone_seconds)
    return Tuned(entry.precision, entry.layout, plan, graphs, alone, entry.notes)


def _kept_reference(stored: StoredModel, cache: PlanCache, entry: CachedPlan) -> Reference:
    if entry.reference is None:
        raise ReferenceInvalid("no reference images are kept with it")
    return read_reference(stored.require_card(), cache.folder(stored.id, stored.version), entry.reference)


def _golden(stored: StoredModel, own: Reference) -> Golden:
    """For the reference that the card names."""
    card = stored.require_card()
    assert card.reference  # noqa: S101  it was read from there
    source = str(stored.folder / card.reference.file)
    return Golden(own, source, lambda: plain_logits(build(card, stored.folder), own.images))


def _measured(stored: StoredModel, backend: Backend, limits: Limits, own: Reference | None) -> _Ready:
    card = stored.require_card()
    shape = card.preprocessing.height, card.preprocessing.width
    module = build(card, stored.folder)
    golden = _golden(stored, own) if own else Golden(computed_reference(module, *shape, SYNTHETIC))
    program = backend.program(module, *shape)
    tuned = Tuning(backend, program, golden, shape, limits).run()
    improving = None
    if backend.improves:
        improving = Improving(
            program, tuned.layout, tuned.precision, shape, golden.check, tuned.plan, limits.max_batch_size,
            forced=limits.precision is not None,
        )  # fmt: skip
    return _Ready(tuned, cached=False, golden=golden, improving=improving)


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
