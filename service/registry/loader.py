"""From a model in the store to one that can run: module, weights, graphs, batch plan. Blocking; it takes seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np
import structlog

from service.backends.base import Backend, DeviceHealth, Graph, Program, build, plain_logits
from service.errors import (
    DeviceFailed,
    GoldenMismatch,
    ModelLoadFailed,
    OutOfMemory,
    ReferenceInvalid,
    ServiceError,
)
from service.execution.executable import CheckedGraphs, Executable, LoadReport
from service.execution.plan import BatchPlan
from service.execution.plan_cache import CachedPlan, PlanCache, PortablePlan, digest, machine
from service.execution.reference import (
    Reference,
    ReferenceCheck,
    computed_reference,
    one_line,
    packed,
    reference_of,
)
from service.execution.tuning import LatencyGraph, Limits, Optimizer, Reserve, Tuned, Tuning, unlimited
from service.store.store import StoredModel

log = structlog.get_logger(component="loader")

NOT_PINNED = "the imported plan is not used"


def load(
    stored: StoredModel,
    backends: Sequence[Callable[[], Backend]],
    limits: Limits,
    cache: PlanCache | None = None,
    devices: DeviceHealth | None = None,
    *,
    compiling: Callable[[], object] = lambda: None,
    reserve: Reserve = unlimited,
) -> Executable:
    """Load `stored` on the first of `backends` that can run it, with the plan in `cache`, else with a measured one.

    A backend that does not reproduce the reference logits can't run it. `devices` notes the failure of a GPU.
    `compiling` is called before that begins, which takes most memory, and `reserve` before each graph for larger
    batches, which are left out where it raises.

    Raises:
        ModelLoadFailed: the card or the weights are wrong, or the model computes no finite numbers.
        Exception: what `compiling` raises, or the last backend's, if none could run it.
    """
    steps, devices, failures = _Steps(), devices or DeviceHealth(), list[str]()
    for i, make in enumerate(backends, 1):
        name = f"backend number {i}"
        try:
            with devices.watched():
                backend = make()
                name = backend.name if backend.device == "cpu" else f"{backend.name} on {backend.device}"
                memory = backend.memory_bytes()  # after its libraries, which are not the model's memory
                own = reference_of(stored.require_card(), stored.folder)
                attempt = _Attempt(stored, backend, limits, cache, devices, own, failures, memory, steps)
                return attempt.restored() or attempt.measured(compiling, reserve)
        except Exception as error:
            failures.append(_failure(name, error))
            if i < len(backends):
                log.warning("backend_failed", model=stored.id, reason=failures[-1])
            elif isinstance(error, GoldenMismatch):
                raise _mismatch(stored, failures, limits) from error
            else:
                raise
    raise ValueError("no backend to load on")


def _failure(name: str, error: Exception) -> str:
    """Why the backend called `name` failed; raises an error that every backend would meet."""
    wrong = isinstance(error, GoldenMismatch)
    # Other errors of ours are about the model's files, which are the same on every backend.
    if isinstance(error, ServiceError) and not isinstance(error, GoldenMismatch | OutOfMemory | DeviceFailed):
        raise error
    return f"{name} failed: {error if wrong else f'{type(error).__name__}: {error}'}"


def _mismatch(stored: StoredModel, failures: Sequence[str], limits: Limits) -> GoldenMismatch:
    """The model's own module reproduces the logits: `ReferenceCheck` has found that out."""
    outputs = "logits" if stored.require_card().labels else "embeddings"
    forced = limits.precision not in {None, "float32"}
    advice = "set PVT_PRECISION=auto" if forced else "try another PVT_BACKEND, or other versions of openvino and torch"
    return GoldenMismatch(
        f"{stored.key} does not give the {outputs} of its reference images, so it is not served: "
        f"{'; '.join(failures)}; its plain float32 module does give them: {advice}"
    )


class _Steps:
    """How long each step of a load takes, in seconds; a load begins when this is made."""

    def __init__(self) -> None:
        self.start = perf_counter()
        # Mutable state: the seconds by step, and when the last one ended.
        self.seconds: dict[str, float] = {}
        self._ended = self.start

    def end(self, step: str, check: ReferenceCheck | None = None) -> None:
        """What ran since the last step was `step`, but for what `check` took, which is new in it."""
        now = perf_counter()
        checked = {"check": check.seconds} if check else {}
        for each, seconds in {step: now - self._ended - sum(checked.values()), **checked}.items():
            self.seconds[each] = self.seconds.get(each, 0.0) + seconds
        self._ended = now


def _as_pinned(
    plan: PortablePlan, program: Program, check: ReferenceCheck, shape: tuple[int, int], reserve: Reserve
) -> Tuned:
    """The graphs of `plan`, checked and not measured; raises where this machine can't make them, or not exactly."""
    graphs: dict[int, Graph] = {}
    for size in sorted(plan.seconds):
        if graphs:
            reserve(size * shape[0] * shape[1])
        graphs[size] = program.graph(size, plan.layout, plan.precision)
    first = next(iter(graphs.values()))
    if first.precision != plan.precision:
        raise ModelLoadFailed(f"it computes in {plan.precision}, and this machine in {first.precision}")
    latency = None
    if plan.alone_layout and plan.alone_seconds:
        alone = program.graph(1, plan.alone_layout, plan.precision)
        latency = LatencyGraph(plan.alone_layout, plan.alone_seconds, lambda: alone)
    deviation = check.check_all(graphs, latency.make() if latency else None)
    batch_plan = BatchPlan(plan.seconds, plan.alone_seconds if latency else None)
    return Tuned(plan.precision, plan.layout, batch_plan, graphs, latency, (), deviation)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Loads `stored` on `backend`. `own` is the reference that its card names.

    `failures` are those of other backends; the load began with `memory` bytes in use.
    """

    stored: StoredModel
    backend: Backend
    limits: Limits
    cache: PlanCache | None
    devices: DeviceHealth
    own: Reference | None
    failures: Sequence[str]
    memory: int
    steps: _Steps

    def restored(self) -> Executable | None:
        """The model with plan and graphs from the cache, if it has an entry."""
        stored, cache, restore = self.stored, self.cache, self.backend.restore
        if not (cache and restore and (found := cache.read(stored.id, stored.version, self._key()))):
            return None
        entry, paths = found
        blobs = {size: np.memmap(path, np.uint8, "r") for size, path in paths.items()}
        self.steps.end("read")
        try:
            graphs = {size: restore(blob, entry.layout, entry.precision) for size, blob in blobs.items()}
            latency, plan = None, BatchPlan(entry.seconds, entry.alone_seconds)
            if (layout := entry.alone_layout) and entry.alone_seconds:
                make = partial(restore, blobs[1], layout, entry.precision)
                latency = LatencyGraph(layout, entry.alone_seconds, make)
            check = self._check(self.own or self._cached_reference(cache, entry))
            deviation = check.check_restored(graphs, plan.time(1))
            self.steps.end("compile", check)
            tuned = Tuned(entry.precision, entry.layout, plan, graphs, latency, entry.notes, deviation)
            return self._executable(tuned, check, cached=True, pinned=self._pinned()[0] is not None)
        except Exception as error:  # noqa: BLE001  whatever is wrong with it, it can be made anew
            log.warning("plan_cache_ignored", model=stored.id, reason=f"{type(error).__name__}: {error}")
            return None

    def measured(self, compiling: Callable[[], object], reserve: Reserve) -> Executable:
        """The model with a plan and graphs that are made and measured now, after `compiling`, and are then cached."""
        compiling()
        card = self.stored.require_card()
        shape = card.preprocessing.height, card.preprocessing.width
        module = build(card, self.stored.folder)
        check = self._check(self.own or computed_reference(module, *shape))
        program = self.backend.program(module, *shape)
        self.steps.end("read")
        tuned, pinned = self._tuned(program, check, shape, reserve)
        self.steps.end("compile", check)
        optimizer = None
        if optimized := program.optimized:
            optimizer = Optimizer(
                program, optimized, tuned.layout, tuned.precision, shape, check.check, tuned.plan, self.limits,
                self.devices,
            )  # fmt: skip
        del module, program, optimized  # nothing else needs the plain weights
        if self.cache and self.backend.restore:
            self._write(self.cache, tuned, check.reference)
            self.steps.end("write")
        for note in tuned.notes:
            log.warning("plan_note", model=self.stored.id, note=note)
        return self._executable(tuned, check, optimizer, cached=False, pinned=pinned)

    def _tuned(
        self, program: Program, check: ReferenceCheck, shape: tuple[int, int], reserve: Reserve
    ) -> tuple[Tuned, bool]:
        """The plan that was imported, with its graphs, or else one that is measured; and whether it is the former."""
        plan, refusal = self._pinned()
        if plan:
            try:
                return _as_pinned(plan, program, check, shape, reserve), True
            except Exception as error:  # noqa: BLE001  whatever is wrong with it here, another can be measured
                refusal = one_line(error)
        tuned = Tuning(self.backend, program, check, shape, self.limits, reserve=reserve).run()
        if refusal:
            tuned = replace(tuned, notes=(*tuned.notes, f"{NOT_PINNED}: {refusal}"))
        return tuned, False

    def _executable(
        self, tuned: Tuned, check: ReferenceCheck, optimizer: Optimizer | None = None, *, cached: bool, pinned: bool
    ) -> Executable:
        stored, backend = self.stored, self.backend
        report = LoadReport(
            backend=backend.name,
            device=backend.device,
            precision=tuned.precision,
            layout=tuned.layout,
            notes=(*self.failures, *tuned.notes),
            cached=cached,
            memory_bytes=max(stored.require_card().weights.bytes, backend.memory_bytes() - self.memory),
            load_seconds=perf_counter() - self.steps.start,
            deviation=tuned.deviation,
            steps=self.steps.seconds,
            key=self._key(),
            pinned=pinned,
        )
        checked = CheckedGraphs(stored.id, tuned.precision, check, forced=self.limits.precision is not None)
        return Executable(stored, backend, tuned, report, checked=checked, optimizer=optimizer)

    def _write(self, cache: PlanCache, tuned: Tuned, reference: Reference) -> None:
        """Cache the plan and its graphs, and the reference if it was computed."""
        computed = None if self.own else packed(reference)
        entry = CachedPlan(
            key=self._key(),
            precision=tuned.precision,
            layout=tuned.layout,
            seconds=dict(tuned.plan.seconds),
            alone_seconds=tuned.plan.alone_seconds,
            alone_layout=tuned.latency.layout if tuned.latency else None,
            notes=tuned.notes,
            graphs={},
            reference=computed and computed[1],
        )
        files = {computed[1].file: computed[0]} if computed else {}
        known = {1: tuned.latency.blob} if tuned.latency and tuned.latency.blob is not None else {}
        # One after another: OpenVINO copies what it exports several times.
        exported = ((size, known[size] if size in known else graph.export()) for size, graph in tuned.graphs.items())
        cache.write(self.stored.id, self.stored.version, entry, exported, files)

    def _cached_reference(self, cache: PlanCache, entry: CachedPlan) -> Reference:
        folder = cache.folder(self.stored.id, self.stored.version)
        reference = reference_of(self.stored.require_card(), folder, entry.reference)
        if reference is None:
            raise ReferenceInvalid("the entry has no reference images")
        return reference

    def _check(self, reference: Reference) -> ReferenceCheck:
        card, folder = self.stored.require_card(), self.stored.folder
        if reference is not self.own or card.reference is None:
            return ReferenceCheck(reference)
        source = str(folder / card.reference.file)
        return ReferenceCheck(reference, source, lambda: plain_logits(build(card, folder), reference.images))

    def _pinned_digest(self) -> str:
        try:
            plan = self.cache.pinned(self.stored.id, self.stored.version) if self.cache else None
        except ValueError:
            return ""
        return digest(plan.model_dump_json().encode()) if plan else ""

    def _pinned(self) -> tuple[PortablePlan | None, str]:
        """The plan that was imported for this model, if it is for this machine and these settings; else why not."""
        try:
            plan = self.cache.pinned(self.stored.id, self.stored.version) if self.cache else None
        except ValueError as error:
            return None, one_line(error)
        if plan is None:
            return None, ""
        reasons = [plan.differences(self._key())] if plan.differences(self._key()) else []
        if self.limits.precision not in {None, plan.precision}:
            reasons.append(f"it computes in {plan.precision}, and PVT_PRECISION is {self.limits.precision}")
        if (most := max(plan.seconds)) > self.limits.max_batch_size:
            reasons.append(f"it has batches of {most}, and PVT_MAX_BATCH_SIZE allows {self.limits.max_batch_size}")
        return (None, "; ".join(reasons)) if reasons else (plan, "")

    def _key(self) -> dict[str, str]:
        """Everything that plan and graphs depend on."""
        card = self.stored.require_card()
        pixels = card.preprocessing
        return {
            "weights": card.weights.sha256,
            "card": digest(card.model_dump_json().encode()),
            "input": f"{pixels.height}x{pixels.width}",
            "backend": f"{self.backend.name} {self.backend.version}",
            "instances": str(self.backend.instances),
            "cores": str(self.limits.cores),
            "max_batch_size": str(self.limits.max_batch_size),
            "precision": self.limits.precision or "auto",
            "pinned": self._pinned_digest(),
            **machine(),
        }
