import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import PvtServe


@pytest.mark.usefixtures("engine_here")
def test_here_and_there_explain_alike(pvt_serve: PvtServe, service_url: str, digits: Path, tmp_path: Path) -> None:
    command = ("explain", digits / "four.png", "--class", "9", "--alpha", "0.4", "--json")
    here = pvt_serve(*command, "-o", tmp_path / "here.png")
    there = pvt_serve(*command, "-o", tmp_path / "there.png", "--url", service_url)

    (mine, theirs) = (json.loads(each.out) for each in (here, there))
    assert mine["logit"] == pytest.approx(np.mean(mine["map"]) + mine["bias"], abs=1e-4)
    assert mine["map"] == [pytest.approx(row, abs=0.05) for row in theirs["map"]]  # another backend
    assert (mine["label"], mine["class_id"], mine["model"]) == ("9", 9, "pvt_v2_b0.digits")
    with Image.open(tmp_path / "here.png") as first, Image.open(tmp_path / "there.png") as second:
        assert first.size == second.size == (64, 64)
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() < 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "name a file for the overlay with -o, or ask for --json"),
        (["-o", "x.png", "--size", "33x"], "--size 33x: "),
    ],
)
@pytest.mark.usefixtures("engine_here")
def test_what_is_missing_or_wrong_is_told_in_one_line(
    pvt_serve: PvtServe, digits: Path, options: list[str], told: str
) -> None:
    done = pvt_serve("explain", digits / "four.png", *options)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"pvt-serve: {told}")
    assert done.err.count("\n") == 1


@pytest.mark.usefixtures("engine_here")
def test_a_class_that_the_model_has_not_is_told(pvt_serve: PvtServe, digits: Path) -> None:
    done = pvt_serve("explain", digits / "four.png", "--json", "--class", "10")

    assert (done.code, "has the classes 0 to 9" in done.err) == (1, True)
