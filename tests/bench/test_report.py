from pathlib import Path

import pytest

from bench.aggregate import breakdown, clients_table, loads_table
from bench.charts import draw
from bench.report import report, summary
from bench.results import Closed, Results, Round, Visit, read, write
from bench.rounds import add_round
from bench.tables import table
from tests.bench.runs import results, turn


def test_the_report_says_of_each_ratio_whether_it_is_reached() -> None:
    text = report(results())

    assert "| images/s, 8 clients: pvt-serve / LitServe | at least 4 | 4.5 (4.5 to 4.5) | 3 | reached |" in text
    assert "/ LitServe + our graph | at least 2.5 | 2 (2 to 2) | 3 | **not reached** |" in text
    assert "| p50 of a lone client: pvt-serve / LitServe | at most 0.25 | 0.2 (0.2 to 0.2) | 3 | reached |" in text
    assert "| images/s, 8 clients: pvt-serve / bare loop | at least 0.9 | 0.9 (0.9 to 0.9) | 3 | reached |" in text


def test_the_report_begins_with_the_chart_and_one_sentence_and_ends_with_the_aims() -> None:
    text = report(results())

    assert text.startswith(
        "# Benchmarks without bfloat16\n\n![Throughput by clients](throughput.svg)\n\nWith 8 clients on 2 cores"
    )
    assert "pvt-serve serves 90 images/s: 4.5 times LitServe; 2 times LitServe + our graph." in text
    assert [line for line in text.splitlines() if line.startswith("## ")][-1] == "## Aims"


def test_the_report_says_what_the_processor_allows_at_all() -> None:
    text = report(results())

    assert "2 cores then serve 100 images/s, which is 5 times LitServe; 2.22 times LitServe + our graph" in " ".join(
        text.split()
    )


def test_the_report_says_what_a_lone_image_takes_at_the_least_today() -> None:
    text = " ".join(report(results()).split())

    assert "A lone image would take 6.5 ms if today's graph lost nothing on being shared out" in text
    assert "and HTTP cost nothing: 0.13 of LitServe's p50." in text


def test_the_report_names_machine_versions_commands_and_who_is_missing() -> None:
    text = report(results())

    assert r"| processor | a \| b |" in text
    assert "torch 2.0" in text
    assert "python -m bench" in text
    assert "Ray Serve was not measured: not installed: ray." in text


def test_every_measured_server_is_described_and_others_are_not() -> None:
    text = report(results())

    assert "- **LitServe** (/predict): transformers' model, eager" in text
    assert "- **mosec**" not in text


def test_the_engines_part_gives_the_share_of_the_peak_and_why_a_figure_is_missing() -> None:
    text = report(results())

    assert "| pvt_v2_b0 | 1.5 | 20 | 75% | aim 55%: reached |" in text
    assert "| pvt_v2_b0 | 8 | 60 | over 600 s | not measured | not measured | 20 |" in text
    assert "no bfloat16 peak" in text


def test_empty_results_make_a_report_that_claims_nothing() -> None:
    text = report(Results())

    assert "reached |" not in text
    assert text.count("| 0 | not measured |") == 5


def test_the_summary_is_the_table_and_the_ratios_without_charts() -> None:
    text = summary(results())

    assert "![" not in text
    assert "| pvt-serve | 8 | 90 (45 to 180) |" in text


def test_rounds_are_summed_up_by_server_and_load() -> None:
    clients, loads = clients_table(results()), loads_table(results())

    assert [row.clients for row in clients["ours"]] == [1, 8]
    assert (clients["ours"][1].rate.median, clients["ours"][1].rate.greatest) == (90, 180)
    assert [(row.offered, row.failed, row.sent, row.rounds) for row in loads["litserve"]] == [
        (10, 3, 150, 3),
        (20, 3, 150, 3),
    ]


def test_core_time_splits_into_decoding_inference_and_the_rest() -> None:
    parts = breakdown(results())

    assert parts["ours"] == {"decode": 5, "inference": 3, "the rest": 1, "all": 9}
    assert parts["litserve"] == {"decode": 6, "inference": 2, "the rest": 1, "all": 9}
    assert parts["litserve-graph"] == {"decode": 5.5, "inference": 3, "the rest": 0.5, "all": 9}


def test_charts_are_drawn_and_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(results(), tmp_path / name)

    names = ["core-time.svg", "latency.svg", "throughput.svg"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_results_are_kept_as_json(tmp_path: Path) -> None:
    write(tmp_path / "new" / "results.json", results())

    assert read(tmp_path / "new" / "results.json") == results()
    assert read(tmp_path / "none.json") == Results()


def test_a_server_that_a_later_round_measured_is_no_longer_missing() -> None:
    grown = add_round(Results(skipped={"ours": "broken", "ray": "broken"}), turn(1.0), {"mosec": "broken"})

    assert grown.skipped == {"ray": "broken", "mosec": "broken"}
    assert len(grown.rounds) == 1


def test_a_load_of_which_nothing_was_answered_shows_no_figure() -> None:
    none = Closed(clients=8, images_per_second=0, p50_ms=0, p99_ms=0, requests=0, failed=0)
    text = report(Results(rounds=(Round(bare=1, visits={"litserve": Visit(closed=(none,), large=none)}),)))

    assert "| LitServe | 8 | none answered |  |  |  | 0 |" in text
    assert "| LitServe | none answered |  |  | 0 |" in text


def test_the_report_says_how_busy_others_kept_the_machine() -> None:
    busy = results().rounds[0].model_copy(update={"busy": 0.25})

    assert "others had up to 25% of the cores in use" in " ".join(report(Results(rounds=(busy,))).split())


def test_bars_in_cells_do_not_end_them() -> None:
    assert table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"


@pytest.mark.parametrize("name", ["throughput.svg", "latency.svg", "core-time.svg"])
def test_the_report_shows_every_chart(name: str) -> None:
    assert f"]({name})" in report(results())
