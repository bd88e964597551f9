import pytest

from bench.ratios import TARGETS, bare, best_peak, bound, figure, large, latency, over, spread, throughput
from bench.results import Results, Round
from tests.bench.runs import results, turn


def test_a_ratio_is_of_one_round_so_a_machine_that_drifts_does_not_move_it() -> None:
    ratio = over(results(), throughput("litserve"))

    assert ratio
    assert (ratio.median, ratio.least, ratio.greatest) == (4.5, 4.5, 4.5)


def test_every_ratio_divides_what_it_says() -> None:
    once = turn(1.0)

    assert [throughput("litserve-graph")(once), latency("litserve")(once)] == [2.0, 0.2]
    assert [bare(once), large(once)] == [0.9, 6.0]


def test_a_round_without_one_of_the_two_has_no_ratio() -> None:
    once = Round(bare=0, visits={})

    assert [target.ratio(once) for target in TARGETS] == [None] * len(TARGETS)
    assert over(Results(rounds=(once,)), throughput("litserve")) is None


def test_targets_are_floors_but_for_latency() -> None:
    assert [target.reached(target.aim) for target in TARGETS] == [True] * 5
    assert [target.reached(target.aim + 0.01) for target in TARGETS] == [True, True, False, True, True]


def test_the_bound_is_decoding_as_measured_and_arithmetic_at_the_peak_on_every_core() -> None:
    limit = bound(results())

    assert limit
    assert (limit.decode_ms, limit.infer_ms, limit.images_per_second) == (5, 15, 100)
    assert limit.peer == {"litserve": 5.0, "litserve-graph": pytest.approx(100 / 45)}


def test_without_peak_or_costs_there_is_no_bound() -> None:
    assert bound(results().model_copy(update={"peaks": ()})) is None
    assert bound(results().model_copy(update={"costs": ()})) is None


def test_the_peak_is_the_best_seen_of_its_precision_and_threads() -> None:
    peak = best_peak(results(), "float32", 1)

    assert peak
    assert peak.flops == 100e9
    assert best_peak(results(), "bfloat16", 1) is None


@pytest.mark.parametrize(("value", "text"), [(0.1234, "0.123"), (12.34, "12.3"), (186.4, "186"), (1234.5, "1234")])
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_spread_shows_median_least_and_greatest() -> None:
    assert str(spread([3.0, 1.0, 2.0])) == "2 (1 to 3)"
    assert spread([]) is None
