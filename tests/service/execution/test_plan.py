import pytest

from service.execution.plan import BatchPlan, batch_seconds, gain


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

    assert [plan.time(n) for n in (1, 2, 3, 8)] == [1.0, 1.5, 3.0, 3.0]


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


def test_gain_compares_images_per_second_with_those_of_the_best_size() -> None:
    seconds = {1: 0.0395, 2: 0.0695}  # 25 and 28.6 images a second, hand-overs included

    assert gain(seconds, 4, 0.0995) == pytest.approx(40 / (2 / 0.07))


def test_an_instance_that_fails_does_not_keep_the_others_waiting() -> None:
    def run(instance: int) -> None:
        if instance == 1:
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        batch_seconds(run, streams=2)


def test_a_time_is_the_least_of_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now, times = 0.0, iter([9.0, 0.25, 0.125, 0.25, 0.25])

    def run(_: int) -> None:
        nonlocal now
        now += next(times)

    monkeypatch.setattr("service.execution.plan.perf_counter", lambda: now)

    assert batch_seconds(run) == 0.125
