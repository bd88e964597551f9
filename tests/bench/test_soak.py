import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from bench.server import ROOT
from bench.soak import Sample, growths, outlooks, report, trend
from bench.soak_load import Tally


def samples(**growing: float) -> list[Sample]:
    """20 of them, a minute apart; `growing` figures grow by so much a minute."""
    figures = {"rss_mb": 500.0, "threads": 30.0, "descriptors": 25.0, "p50_ms": 5.0, "p99_ms": 20.0}
    return [
        Sample(60.0 * minute, **{name: value + growing.get(name, 0) * minute for name, value in figures.items()})
        for minute in range(20)
    ]


def test_what_stays_as_it_is_has_no_slope_and_is_no_fault() -> None:
    assert growths(samples()) == []
    assert trend(samples(), "rss_mb").per_hour == pytest.approx(0)


@pytest.mark.parametrize("name", ["rss_mb", "threads", "descriptors"])
def test_what_grows_is_a_fault_with_its_figures(name: str) -> None:
    found = growths(samples(**{name: 10}))

    assert len(found) == 1
    assert "grew to" in found[0]
    assert trend(samples(**{name: 10}), name).per_hour == pytest.approx(600)


def test_a_short_run_says_what_its_slope_would_mean_for_an_hour() -> None:
    growing = samples(rss_mb=3)

    assert growths(growing) == []
    assert "would grow by 180 in an hour" in report(growing, Tally(), [])
    assert outlooks(samples()) == []


def test_a_jump_at_the_beginning_is_no_growth() -> None:
    first, *rest = samples()

    assert growths([Sample(0, 100, 5, 5, 1, 1), *rest]) == []
    assert growths([first, *rest]) == []


def test_a_refusal_without_retry_after_and_a_wrong_answer_are_kept_and_reported() -> None:
    tally = Tally()
    tally.add("predictions", httpx.Response(200, text="7"), lambda it: it.text == "7")
    tally.add("predictions", httpx.Response(503, headers={"Retry-After": "1"}), lambda _: False)
    tally.add("predictions", httpx.Response(503, text="no header"), lambda _: False)
    tally.add("predictions", httpx.Response(200, text="8"), lambda it: it.text == "7")

    page = report(samples(), tally, tally.wrong)

    assert (tally.good["predictions"], tally.refused["predictions"]) == (1, 1)
    assert "- predictions: 503 no header\n- predictions: 200 8\n" in page
    assert "**This run took 19 minutes**" in page


def test_a_soak_of_seconds_ends_well_and_writes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "soak.md"

    command = [sys.executable, "-m", "bench.soak", "--minutes", "0.2", "--out", str(page)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)

    assert run.returncode == 0, run.stdout + run.stderr
    assert "Nothing grew beyond its bound, and no answer was wrong." in page.read_text()
    for kind in ("predictions", "features", "explanations", "bad images", "hang-ups", "slow uploads", "unloads"):
        assert f"| {kind} | " in page.read_text()
