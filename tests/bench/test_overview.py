from bench.overview import overview
from bench.results import Model, Results
from tests.bench.runs import results


def machines() -> tuple[Results, Results]:
    """The same figures as of two kinds of processor; the one with bfloat16 has been measured with a model, too."""
    model = Model(
        parameters=3_666_760,
        weights_bytes=15_000_000,
        first_load_seconds=4.21,
        cached_load_seconds=0.41,
        rates=(70, 80),
    )
    native = results().machine | {"bfloat16": "native"}
    return (
        results().model_copy(update={"machine": native, "models": {"pvt_v2_b0": model}}),
        results().model_copy(update={"rounds": results().rounds[:1]}),
    )


def test_it_begins_with_the_chart_and_the_ratio_of_each_kind_in_one_sentence() -> None:
    text = overview(machines())

    assert text.index("![Throughput by clients](benchmarks/with-bfloat16/throughput.svg)") < text.index(
        "With 8 clients"
    )
    assert "serves 4.5 times (with bfloat16) and 4.5 times (without bfloat16) as many images per second" in text


def test_both_kinds_stand_side_by_side_for_each_server_and_model() -> None:
    text = overview(machines())

    assert "| pvt-serve | 90 (45 to 180) |  | 90 (90 to 90) |  |" in text
    assert "| LitServe | 20 (10 to 40) | 4.5 (4.5 to 4.5) | 20 (20 to 20) | 4.5 (4.5 to 4.5) |" in text
    assert "| LitServe | 50 (25 to 100) | 0.2 (0.2 to 0.2) | 50 (50 to 50) | 0.2 (0.2 to 0.2) |" in text
    assert "| `pvt_v2_b0` | 3,666,760 | 15 MB | 4.2 s | 0.41 s | 75 (70 to 80) |  |  |  |" in text


def test_aims_that_are_not_reached_come_last() -> None:
    rows = overview(machines()).splitlines()

    assert "**not reached**" in rows[-1]
    assert "LitServe + our graph" in rows[-1]
    assert "**not reached**" not in rows[-2]


def test_without_results_nothing_is_claimed() -> None:
    text = overview(())

    assert "was not measured beside LitServe" in text
    assert "times" not in text
