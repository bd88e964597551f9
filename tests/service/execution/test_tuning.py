import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from service.backends.base import Blob, Graph, Images, Layout, Precision, Program, Served
from service.backends.cpu import TorchBackend
from service.errors import GoldenMismatch, ModelLoadFailed, ReferenceInvalid
from service.execution.reference import TOLERANCE, Reference, ReferenceCheck
from service.execution.tuning import Limits, Tuned, Tuning
from service.results import Floats

SHAPE = (32, 32)
TUNING_SECONDS = TorchBackend.tuning_seconds
CLASSES = 4
REFERENCE = Reference(np.zeros((2, *SHAPE, 3), np.uint8), np.tile(np.arange(CLASSES, dtype=np.float32), (2, 1)))

Seconds = Callable[[Layout, int, Precision], float]


class Clock(threading.local):
    """A clock of its own for each thread, moved by the runs of that thread."""

    now = 0.0


@dataclass
class FakeBackend:
    """Runs take `seconds` of the clock; `broken` says which graphs can't be compiled.

    `logits` replaces the reference's by precision, in graphs that `wrong` chooses, by default in all.
    """

    clock: Clock
    seconds: Seconds
    instances: int = 2
    precisions: tuple[Precision, ...] = ("bfloat16", "float32")
    native: tuple[Precision, ...] = ("bfloat16", "float32")
    logits: Mapping[Precision, Floats] = field(default_factory=dict)
    wrong: Callable[[Layout, int, Precision], bool] = lambda *_: True
    broken: Callable[[Layout, int, Precision], bool] = lambda *_: False
    compile_seconds: float = 0.0
    name: str = "fake"
    version: str = "1"
    device: str = "cpu"
    tuning_seconds: float = TUNING_SECONDS
    probe_size: int = 1
    made: list[tuple[Layout, int, Precision]] = field(default_factory=list)

    def layouts(self, cores: int) -> Sequence[Layout]:
        return TorchBackend(self.instances).layouts(cores)

    def memory_bytes(self) -> int:
        return 0

    def program(self, module: Served, height: int, width: int) -> Program:
        raise NotImplementedError(module, height, width)

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:
        self.made.append((layout, size, precision))
        self.clock.now += self.compile_seconds
        if self.broken(layout, size, precision):
            raise RuntimeError("no such instruction")
        return FakeGraph(self, size, layout, precision if precision in self.native else "float32")

    def restore(self, blob: Blob, layout: Layout, precision: Precision) -> Graph:
        assert blob.tobytes() == b"compiled"
        return self.graph(1, layout, precision)


@dataclass
class FakeGraph(Graph):
    backend: FakeBackend
    size: int
    layout: Layout
    precision: Precision

    def run(self, instance: int, images: Images) -> tuple[Floats, Floats]:
        assert instance in range(self.backend.instances)
        assert len(images) == self.size
        self.backend.clock.now += self.backend.seconds(self.layout, self.size, self.precision)
        logits = REFERENCE.logits[0]
        if self.backend.wrong(self.layout, self.size, self.precision):
            logits = self.backend.logits.get(self.precision, logits)
        return np.tile(logits, (self.size, 1)), np.ones((self.size, 2), np.float32)

    def export(self) -> bytes:
        return b"compiled"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("service.execution.plan", "service.execution.tuning"):
        monkeypatch.setattr(f"{module}.perf_counter", lambda: clock.now)
    return clock


def tune(
    backend: FakeBackend, *, cores: int = 2, precision: Precision | None = None, check: ReferenceCheck | None = None
) -> Tuned:
    limits = Limits(cores, max_batch_size=4, precision=precision)
    program, check = Program(backend.graph), check or ReferenceCheck(REFERENCE)
    return Tuning(backend, program, check, SHAPE, limits, started=backend.clock.now).run()


def even(layout: Layout, size: int, precision: Precision) -> float:
    """Cores scale perfectly, and bfloat16 is twice as fast as float32; batches and a latency graph gain nothing."""
    del layout
    return size * (0.04 if precision == "bfloat16" else 0.08)


def halving(layout: Layout, size: int, precision: Precision) -> float:
    """As `even`, and two cores work at one image nearly twice as fast."""
    return even(layout, size, precision) / (1.8 if layout.threads == 2 else 1)


def test_the_faster_precision_is_used_where_its_logits_are_as_good(clock: Clock) -> None:
    tuned = tune(FakeBackend(clock, even))

    assert tuned.precision == "bfloat16"
    assert tuned.plan.sizes == (1,)
    assert tuned.plan.time(1) == pytest.approx(0.04)
    assert tuned.notes == ()


def test_a_reduced_precision_that_is_slower_is_not_used(clock: Clock) -> None:
    def emulated(layout: Layout, size: int, precision: Precision) -> float:
        return even(layout, size, "float32" if precision == "bfloat16" else "bfloat16")

    assert tune(FakeBackend(clock, emulated)).precision == "float32"


def test_precisions_are_compared_at_the_batch_size_of_the_backends_options(clock: Clock) -> None:
    def late(layout: Layout, size: int, precision: Precision) -> float:
        """bfloat16 is faster from batches of 4 on."""
        return even(layout, size, precision) if size >= 4 else 0.05 if precision == "float32" else 0.06

    assert tune(FakeBackend(clock, late)).precision == "float32"
    assert tune(FakeBackend(clock, late, probe_size=4)).precision == "bfloat16"


def test_a_precision_that_can_not_be_run_at_that_size_is_not_used(clock: Clock) -> None:
    tuned = tune(
        FakeBackend(
            clock,
            even,
            probe_size=4,
            broken=lambda _, size, precision: (size, precision) == (4, "bfloat16"),
        )
    )

    assert tuned.precision == "float32"
    assert tuned.notes[0] == "bfloat16 in batches of 4 failed with RuntimeError: no such instruction"


WRONG = np.array([0, 1, 2.2, 2.9], np.float32)


def test_a_reduced_precision_whose_logits_are_worse_is_refused_with_the_figures(clock: Clock) -> None:
    tuned = tune(FakeBackend(clock, even, logits={"bfloat16": WRONG}))

    assert tuned.precision == "float32"
    (note,) = tuned.notes
    assert note == (
        "bfloat16 is not used: logits are off by 0.067 of their spread, 0.03 is allowed (bfloat16, batches of 1: "
        "largest difference 0.2 in image 0, 0.067 of the logits' spread, cosine 0.998269, another top class in 0 of 2)"
    )
    assert tuned.deviation is not None
    assert tuned.deviation.share == 0


def test_any_graph_of_the_plan_that_is_worse_makes_the_whole_plan_float32(clock: Clock) -> None:
    def gaining(_: Layout, size: int, precision: Precision) -> float:
        return (0.04 + 0.01 * size) / (2 if precision == "bfloat16" else 1)

    backend = FakeBackend(clock, gaining, logits={"bfloat16": WRONG}, wrong=lambda _, size, __: size == 4)

    tuned = tune(backend)

    assert tuned.precision == "float32"
    assert {graph.precision for graph in tuned.graphs.values()} == {"float32"}
    assert tuned.plan.sizes == (1, 2, 4)
    assert tuned.plan.time(1) == pytest.approx(0.05)
    (note,) = tuned.notes
    assert note.startswith("bfloat16 is not used: logits are off by 0.067 of their spread, 0.03 is allowed")
    assert "(bfloat16, batches of 4: " in note


def test_a_latency_graph_that_is_worse_makes_the_plan_float32_too(clock: Clock) -> None:
    backend = FakeBackend(
        clock, halving, logits={"bfloat16": WRONG}, wrong=lambda layout, size, _: (layout.streams, size) == (1, 1)
    )

    tuned = tune(backend)

    assert tuned.precision == "float32"
    assert tuned.latency is not None
    assert tuned.latency.make().precision == "float32"
    assert tuned.notes[0].startswith("bfloat16 is not used: ")


def test_another_precision_below_float32_is_taken_where_one_fails_in_a_batch(clock: Clock) -> None:
    def timed(layout: Layout, size: int, precision: Precision) -> float:
        return even(layout, size, "bfloat16" if precision == "float16" else precision) * (0.5 + 0.5 / size)

    kinds: tuple[Precision, ...] = ("bfloat16", "float16", "float32")
    backend = FakeBackend(clock, timed, precisions=kinds, native=kinds, logits={"bfloat16": WRONG},
                          wrong=lambda _, size, __: size == 2)  # fmt: skip

    tuned = tune(backend)

    assert tuned.precision == "float16"
    assert [note.partition(":")[0] for note in tuned.notes] == ["bfloat16 is not used"]


def test_a_precision_that_is_given_up_is_not_taken_under_another_ones_name(clock: Clock) -> None:
    def timed(_: Layout, size: int, precision: Precision) -> float:
        return (0.04 + 0.01 * size) / (1 if precision == "float32" else 2)

    class Emulating(FakeBackend):
        def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:
            return super().graph(size, layout, "bfloat16" if precision == "float16" else precision)

    backend = Emulating(
        clock,
        timed,
        precisions=("float16", "float32"),
        logits={"bfloat16": WRONG},
        wrong=lambda _, size, __: size == 2,
    )

    tuned = tune(backend)

    assert tuned.precision == "float32"
    assert [note.partition(":")[0] for note in tuned.notes] == ["bfloat16 is not used"]


def test_a_plan_that_starts_over_in_float32_has_its_time_and_its_own_notes(clock: Clock) -> None:
    backend = FakeBackend(
        clock,
        lambda layout, size, precision: even(layout, size, precision) * (0.5 + 0.5 / size),
        logits={"bfloat16": WRONG},
        wrong=lambda _, size, __: size == 2,
        broken=lambda _, size, precision: (size, precision) == (4, "bfloat16"),
        compile_seconds=TUNING_SECONDS * 0.05,
    )

    tuned = tune(backend)

    assert (tuned.precision, tuned.plan.sizes) == ("float32", (1, 2, 4))
    assert len(tuned.notes) == 1  # nothing of batches of 4 in bfloat16, which are not part of it


def test_float32_that_is_wrong_in_any_graph_gives_the_backend_up(clock: Clock) -> None:
    def timed(_: Layout, size: int, __: Precision) -> float:
        return 0.04 + 0.01 * size

    with pytest.raises(GoldenMismatch, match=r"float32, batches of 2: "):
        tune(FakeBackend(clock, timed, logits={"float32": WRONG, "bfloat16": WRONG}, wrong=lambda _, n, __: n == 2))


def test_a_reference_that_the_model_itself_misses_is_at_fault_and_no_precision(clock: Clock) -> None:
    check = ReferenceCheck(REFERENCE, "store/reference.safetensors", lambda: REFERENCE.logits[:, ::-1])
    backend = FakeBackend(clock, even, logits=dict.fromkeys(("bfloat16", "float32"), REFERENCE.logits[0, ::-1]))

    with pytest.raises(
        ReferenceInvalid, match=r"^store/reference\.safetensors: the model itself, in plain float32, "
    ) as it:
        tune(backend, check=check)

    assert "weights, labels or preprocessing do not belong together" in str(it.value)
    assert "bfloat16" not in str(it.value)


def with_top(gap: float) -> tuple[Reference, Floats]:
    """A reference whose two best classes are `gap` of the spread apart, and logits that change places between them."""
    first, second = 10.0, 10.0 * (1 - gap)
    true = np.array([first, second, 1.0, 0.0], np.float32)
    middle = (first + second) / 2
    return Reference(REFERENCE.images, np.tile(true, (2, 1))), np.array(
        [middle - 1e-4, middle + 1e-4, 1, 0], np.float32
    )


@pytest.mark.parametrize(
    ("gap", "precision"), [(TOLERANCE * 0.9, "bfloat16"), (TOLERANCE * 1.1, "float32"), (0.0, "bfloat16")]
)
def test_two_classes_may_change_places_where_they_are_nearer_than_the_tolerance(
    clock: Clock, gap: float, precision: Precision
) -> None:
    reference, swapped = with_top(gap)
    backend = FakeBackend(clock, even, logits={"bfloat16": swapped, "float32": reference.logits[0]})

    tuned = tune(backend, check=ReferenceCheck(reference))

    assert tuned.precision == precision
    if precision == "float32":
        assert "the top class of 2 of 2 reference images changes, between classes that are 0.033 of" in tuned.notes[0]
    else:
        assert tuned.deviation is not None
        assert tuned.deviation.swap == pytest.approx(gap, abs=1e-6)


def test_a_precision_that_gives_not_a_number_is_refused(clock: Clock) -> None:
    backend = FakeBackend(clock, even, logits={"bfloat16": np.full(CLASSES, np.nan, np.float32)})

    assert tune(backend).precision == "float32"
    with pytest.raises(GoldenMismatch, match="gives NaN or infinity"):
        tune(backend, precision="bfloat16")


def under_load(size: int) -> bool:
    return size == 1 and threading.current_thread().name.startswith("pvt-measure")


def when_checked(size: int) -> bool:
    return size == 2 and threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize("when", [under_load, when_checked])
@pytest.mark.parametrize("precisions", [("bfloat16", "float32"), ("bfloat16",)])
def test_a_precision_whose_graphs_fail_as_they_run_gives_way_to_float32(
    clock: Clock, when: Callable[[int], bool], precisions: tuple[Precision, ...]
) -> None:
    def failing(_: Layout, size: int, precision: Precision) -> float:
        if precision == "bfloat16" and when(size):
            raise RuntimeError("no room")
        return (0.04 + 0.01 * size) * (1 if precision == "bfloat16" else 2)

    tuned = tune(FakeBackend(clock, failing, precisions=precisions))

    assert (tuned.precision, tuned.plan.sizes) == ("float32", (1, 2, 4))
    assert tuned.notes[0].startswith("bfloat16 ")
    assert "failed with RuntimeError: no room" in tuned.notes[0]
    with pytest.raises(RuntimeError, match="no room"):
        tune(FakeBackend(clock, failing, precisions=precisions), precision="bfloat16")


@pytest.mark.parametrize("size", [1, 2])
def test_a_forced_precision_that_is_worse_is_refused_with_the_figures(clock: Clock, size: int) -> None:
    def timed(_: Layout, size: int, __: Precision) -> float:
        return 0.04 + 0.01 * size

    backend = FakeBackend(clock, timed, logits={"bfloat16": WRONG}, wrong=lambda _, n, __: n == size)

    with pytest.raises(GoldenMismatch, match=rf"off by 0\.067 of their spread.* \(bfloat16, batches of {size}: "):
        tune(backend, precision="bfloat16")
    assert tune(backend, precision="float32").precision == "float32"


def test_a_forced_precision_that_the_machine_lacks_is_noted(clock: Clock) -> None:
    tuned = tune(FakeBackend(clock, even, native=("float32",)), precision="bfloat16")

    assert tuned.precision == "float32"
    assert tuned.notes == ("bfloat16 was requested, this machine computes in float32",)


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_precision_that_can_not_be_compiled_falls_back_and_says_so(clock: Clock, precision: Precision | None) -> None:
    tuned = tune(FakeBackend(clock, even, broken=lambda *what: what[2] == "bfloat16"), precision=precision)

    assert tuned.precision == "float32"
    assert tuned.notes == ("bfloat16 is not used: it failed with RuntimeError: no such instruction",)


def test_a_model_that_can_not_be_compiled_at_all_raises_what_the_backend_says(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="no such instruction"):
        tune(FakeBackend(clock, even, broken=lambda *_: True))


def test_a_model_that_gives_not_a_number_in_every_precision_is_refused(clock: Clock) -> None:
    nan = np.full(CLASSES, np.nan, np.float32)

    with pytest.raises(ModelLoadFailed, match="gives NaN or infinity"):
        tune(FakeBackend(clock, even, logits={"bfloat16": nan, "float32": nan}))


def test_a_batch_size_that_fails_is_left_out_and_the_model_serves(clock: Clock) -> None:
    tuned = tune(FakeBackend(clock, lambda *_: 0.04, broken=lambda _, size, __: size == 4))

    assert tuned.plan.sizes == (1, 2)
    assert set(tuned.graphs) == {1, 2}
    assert tuned.notes == ("batches of 4 and more are left out, 4 failed: RuntimeError: no such instruction",)


def test_there_is_a_latency_graph_where_all_cores_are_measurably_faster(clock: Clock) -> None:
    tuned = tune(FakeBackend(clock, halving))

    assert tuned.layout == Layout(2, 1)
    assert tuned.latency is not None
    assert tuned.latency.layout == Layout(1, 2)
    assert tuned.plan.alone_seconds == pytest.approx(0.04 / 1.8)


def test_there_is_no_latency_graph_where_all_cores_gain_little(clock: Clock) -> None:
    tuned = tune(FakeBackend(clock, even))

    assert tuned.latency is None
    assert tuned.plan.alone_seconds is None


def test_fewer_streams_of_more_cores_run_everything_where_they_give_more_images(clock: Clock) -> None:
    def superlinear(layout: Layout, size: int, precision: Precision) -> float:
        return even(layout, size, precision) / (2.5 if layout.threads == 2 else 1)

    tuned = tune(FakeBackend(clock, superlinear))

    assert tuned.layout == Layout(1, 2)
    assert tuned.latency is None
    # The one stream serves both instances in turn, so that a batch takes each of them twice its time.
    assert tuned.plan.time(1) == pytest.approx(2 * 0.04 / 2.5)


def test_a_layout_that_fails_is_left_out(clock: Clock) -> None:
    tuned = tune(FakeBackend(clock, halving, broken=lambda layout, *_: layout.threads == 2))

    assert tuned.layout == Layout(2, 1)
    assert tuned.notes == ("1 x 2 cores failed: RuntimeError: no such instruction",)


def test_measuring_stops_at_the_first_size_that_is_not_worth_its_wait(clock: Clock) -> None:
    backend = FakeBackend(clock, even, precisions=("float32",))

    assert tune(backend).plan.sizes == (1,)
    assert {size for _, size, _ in backend.made} == {1, 2}


def test_a_short_run_is_batched_for_the_hand_overs_it_saves(clock: Clock) -> None:
    assert tune(FakeBackend(clock, lambda _, size, __: 0.005 * size)).plan.sizes == (1, 2)


def test_measuring_goes_up_to_the_limit_where_batches_pay(clock: Clock) -> None:
    plan = tune(FakeBackend(clock, lambda _, size, __: 0.01 + 0.0001 * size)).plan

    assert plan.sizes == (1, 2, 4)
    assert plan.time(4) == pytest.approx(0.0104)


def test_what_would_take_longer_than_the_budget_is_left_out(clock: Clock) -> None:
    backend = FakeBackend(clock, lambda *_: 0.04, compile_seconds=TUNING_SECONDS * 0.6)

    tuned = tune(backend)

    assert tuned.plan.sizes == (1,)
    assert "would take too long" in tuned.notes[0]
    assert {precision for _, _, precision in backend.made} == {"bfloat16"}


def test_what_compiling_the_first_graph_took_counts_for_the_next_sizes(clock: Clock) -> None:
    backend = FakeBackend(clock, lambda *_: 0.04, precisions=("float32",), compile_seconds=TUNING_SECONDS * 0.2)

    tuned = tune(backend)

    assert tuned.plan.sizes == (1,)  # two layouts took four tenths of the budget, the next size would take twice that
    assert "would take too long" in tuned.notes[0]


def test_layouts_use_all_cores_by_halves_unless_the_number_of_instances_was_chosen() -> None:
    assert TorchBackend(8).layouts(8) == (Layout(8, 1), Layout(4, 2), Layout(2, 4), Layout(1, 8))
    assert TorchBackend(3).layouts(3) == (Layout(3, 1), Layout(1, 3))
    assert TorchBackend(2).layouts(8) == (Layout(2, 4), Layout(1, 8))
    assert TorchBackend(1).layouts(1) == (Layout(1, 1),)
