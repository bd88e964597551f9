from collections.abc import Callable

import pytest

from service.execution.plan import BatchPlan, batch_seconds, measure


def test_best_never_takes_more_than_the_largest_size() -> None:
    plan = BatchPlan({1: 1.0, 4: 2.0})

    assert plan.best(100) == 4


def test_best_takes_the_count_with_the_most_images_per_second() -> None:
    dear_padding = BatchPlan({1: 1.0, 2: 1.5, 8: 6.0})

    assert dear_padding.best(3) == 2
    assert dear_padding.best(7) == 2
    assert BatchPlan({1: 1.0, 8: 1.1}).best(3) == 3


def test_best_takes_one_at_a_time_where_batches_buy_nothing() -> None:
    assert BatchPlan({1: 0.005}).best(9) == 1


def test_a_batch_is_padded_to_the_next_compiled_size() -> None:
    plan = BatchPlan({1: 1.0, 2: 1.5, 8: 3.0})

    assert [plan.padded(n) for n in (1, 2, 3, 8)] == [1, 2, 8, 8]
    assert plan.time(3) == 3.0


def test_without_drops_every_size_that_holds_the_count_but_never_the_last() -> None:
    plan = BatchPlan({1: 1.0, 2: 1.5, 8: 3.0})

    assert plan.without(2).sizes == (1,)
    assert plan.without(8).sizes == plan.without(3).sizes == (1, 2)
    assert plan.without(1).sizes == (1,)


def test_image_seconds_is_the_cost_of_an_image_in_the_best_full_batch() -> None:
    assert BatchPlan({1: 1.0, 8: 4.0}).image_seconds() == 0.5


def test_an_empty_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one size"):
        BatchPlan({})


class FakeMachine:
    """Runs batches of n in `seconds(n)` of a clock of its own."""

    def __init__(self, seconds: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.prepared: list[int] = []
        self._seconds = seconds
        monkeypatch.setattr("service.execution.plan.perf_counter", lambda: self.now)

    def seconds_of(self, size: int) -> float:
        self.prepared.append(size)

        def run(_: int) -> None:
            self.now += self._seconds(size)

        return batch_seconds(run)


def test_measuring_stops_at_the_first_size_that_is_not_worth_its_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(lambda n: 0.04 * n, monkeypatch)

    plan = measure(machine.seconds_of, 64)

    assert plan.sizes == (1,)
    assert plan.time(1) == pytest.approx(0.04)
    assert machine.prepared == [1, 2]


def test_a_short_run_is_batched_for_the_hand_overs_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(lambda n: 0.005 * n, monkeypatch)

    assert measure(machine.seconds_of, 64).sizes == (1, 2)


def test_measuring_goes_up_to_the_ceiling_where_batches_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(lambda n: 0.01 + 0.0001 * n, monkeypatch)

    assert measure(machine.seconds_of, 16).sizes == (1, 2, 4, 8, 16)
