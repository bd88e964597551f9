from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from threading import Event

import numpy as np
import pytest

from service.backends.base import DeviceHealth, Graph, Images, Layout, OptimizedGraphs, Precision, Program
from service.errors import DeviceFailed, GoldenMismatch, OutOfMemory
from service.execution.plan import BatchPlan
from service.execution.tuning import Limits, OptimizedGraph, Optimizer
from service.results import Floats

LAYOUT = Layout(1, 1)


@dataclass
class FakeGraph(Graph):
    program: "FakeProgram"
    size: int
    seconds: float
    precision: Precision = "bfloat16"

    def run(self, instance: int, images: Images) -> tuple[Floats, ...]:
        assert (instance, len(images)) == (0, self.size)
        self.program.now += self.seconds * self.program.slower
        return (np.zeros((self.size, 1), np.float32),)


@dataclass
class FakeProgram:
    """Eager batches take `eager` seconds, compiled ones `compiled`, times `float32_takes` in float32.

    Load makes all of them `slower`. `broken` is the batch size at which the device fails.
    """

    eager: Callable[[int], float]
    compiled: Callable[[int], float]
    slower: float = 1.0
    float32_takes: float = 1.5
    fits: int = 1024
    uncompilable: frozenset[int] = frozenset()
    broken: int | None = None
    now: float = 0.0
    made: list[tuple[str, int]] = field(default_factory=list)
    precisions: list[Precision] = field(default_factory=list)

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:
        assert (layout, precision) == (LAYOUT, "bfloat16")
        self.made.append(("eager", size))
        return FakeGraph(self, size, self.eager(size))

    def prepare(self, size: int, precision: Precision, stopped: Event) -> None:
        self.precisions.append(precision)
        if size in self.uncompilable:
            raise RuntimeError("no C compiler")
        assert not stopped.is_set()
        self.made.append(("prepared", size))

    def optimized_graph(self, size: int, precision: Precision) -> Graph:
        assert precision == self.precisions[-1]
        assert self.made[-1] == ("prepared", size)
        if size == self.broken:
            raise DeviceFailed("cuda:0 failed")
        if size > self.fits:
            raise OutOfMemory(f"{size} does not fit")
        self.made.append(("compiled", size))
        seconds = self.compiled(size) * (self.float32_takes if precision == "float32" else 1)
        return FakeGraph(self, size, seconds, precision)


def optimize(
    program: FakeProgram,
    plan: BatchPlan,
    monkeypatch: pytest.MonkeyPatch,
    *,
    most: int = 8,
    bad: Collection[tuple[int, Precision]] = (),
    forced: bool = False,
    devices: DeviceHealth | None = None,
) -> tuple[list[OptimizedGraph], list[str]]:
    monkeypatch.setattr("service.execution.plan.perf_counter", lambda: program.now)

    def check(graph: Graph, size: int) -> None:
        if (size, graph.precision) in bad:
            raise GoldenMismatch("off by 0.5")

    limits = Limits(1, most, "bfloat16" if forced else None)
    optimized = OptimizedGraphs(program.prepare, program.optimized_graph)
    whole = Program(program.graph, optimized)
    optimizer = Optimizer(
        whole, optimized, LAYOUT, "bfloat16", (32, 32), check, plan, limits, devices or DeviceHealth()
    )
    made = []
    while optimizer.size:
        optimizer.prepare()
        if each := optimizer.make():
            made.append(each)
    assert optimizer.make() is None
    return made, optimizer.notes


def sizes(made: list[OptimizedGraph]) -> dict[int, float]:
    return {each.size: round(each.seconds, 6) for each in made}


PLAN = BatchPlan({1: 1.0, 2: 1.5})


def eager(size: int) -> float:
    return PLAN.seconds.get(size, 2.0 * size)


def test_each_size_is_replaced_by_a_graph_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(eager, lambda size: 0.5 * size)

    made, notes = optimize(program, PLAN, monkeypatch)

    assert sizes(made) == {1: 0.5, 2: 1.0}
    assert notes == []


def test_a_graph_that_is_no_faster_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(eager, lambda size: 1.4 if size == 2 else 1.1 * size)

    made, _ = optimize(program, PLAN, monkeypatch)

    assert sizes(made) == {2: 1.4}


def test_larger_batches_are_added_as_long_as_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {1: 0.5, 2: 0.6, 4: 0.8, 8: 1.6}
    program = FakeProgram(eager, compiled.__getitem__)

    made, notes = optimize(program, PLAN, monkeypatch, most=16)

    assert sizes(made) == {1: 0.5, 2: 0.6, 4: 0.8}
    assert notes == []
    assert ("compiled", 16) not in program.made


def test_no_batch_is_larger_than_the_setting_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(eager, lambda _: 0.5)

    made, _ = optimize(program, PLAN, monkeypatch, most=4)

    assert [*sizes(made)] == [1, 2, 4]


def test_other_load_does_not_make_a_graph_seem_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(eager, {1: 0.5, 2: 0.6, 4: 0.8, 8: 1.6}.__getitem__, slower=3.0)

    made, _ = optimize(program, PLAN, monkeypatch)

    assert sizes(made) == {1: 0.5, 2: 0.6, 4: 0.8}


def test_a_graph_with_wrong_logits_is_made_in_float32_and_the_next_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(eager, {1: 0.5, 2: 0.6, 4: 0.8, 8: 1.6}.__getitem__)

    made, notes = optimize(program, PLAN, monkeypatch, bad={(2, "bfloat16")})

    assert sizes(made) == {1: 0.5, 2: 0.9, 4: 0.8}
    assert [each.graph.precision for each in made] == ["bfloat16", "float32", "bfloat16"]
    assert notes == ["batches of 2 are compiled in float32, bfloat16 is not used: off by 0.5"]


def test_the_present_graph_stays_where_float32_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(eager, lambda size: 0.5 * size, float32_takes=3.0)

    made, _ = optimize(program, PLAN, monkeypatch, bad={(1, "bfloat16")}, most=2)

    assert sizes(made) == {2: 1.0}


def test_a_larger_batch_may_join_in_float32_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(eager, {1: 0.5, 2: 0.6, 4: 0.7, 8: 4.0}.__getitem__)

    made, _ = optimize(program, PLAN, monkeypatch, bad={(4, "bfloat16")})

    assert sizes(made) == {1: 0.5, 2: 0.6, 4: 1.05}


@pytest.mark.parametrize(("bad", "forced"), [([(2, "bfloat16"), (2, "float32")], False), ([(2, "bfloat16")], True)])
def test_wrong_logits_in_float32_or_in_a_forced_precision_end_it_with_a_note(
    monkeypatch: pytest.MonkeyPatch, bad: list[tuple[int, Precision]], *, forced: bool
) -> None:
    program = FakeProgram(eager, lambda size: 0.5 * size)

    made, notes = optimize(program, PLAN, monkeypatch, bad=bad, forced=forced)

    assert sizes(made) == {1: 0.5}
    assert notes[-1] == "batches of 2 and more are not compiled: GoldenMismatch: off by 0.5"


def test_too_little_memory_for_a_larger_batch_ends_it_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(eager, lambda _: 0.5, fits=2)

    made, notes = optimize(program, PLAN, monkeypatch)

    assert [*sizes(made)] == [1, 2]
    assert notes == ["batches of 4 and more are not compiled: OutOfMemory: 4 does not fit"]


def test_a_size_that_can_not_be_prepared_ends_it_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    program = FakeProgram(eager, lambda size: 0.5 * size, uncompilable=frozenset({2}))

    made, notes = optimize(program, PLAN, monkeypatch)

    assert sizes(made) == {1: 0.5}
    assert notes == ["batches of 2 and more are not compiled: RuntimeError: no C compiler"]


def test_a_card_that_fails_ends_it_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    program, devices = FakeProgram(eager, lambda size: 0.5 * size, broken=2), DeviceHealth()

    made, notes = optimize(program, PLAN, monkeypatch, devices=devices)

    assert sizes(made) == {1: 0.5}
    assert notes == ["batches of 2 and more are not compiled: DeviceFailed: cuda:0 failed"]
    assert devices.failure == "cuda:0 failed"
