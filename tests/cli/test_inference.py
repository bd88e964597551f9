import csv
import json
import os
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import PvtServe
from tests.cli.terminals import on_terminal
from tests.conftest import ROOT
from tests.pvt_client.scripted import refused, scripted


@pytest.mark.usefixtures("local_engine")
def test_without_a_service_the_model_runs_in_this_process(pvt_serve: PvtServe, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")

    done = pvt_serve("predict", "--json", "-k", "1", digits, tmp_path)

    results = [json.loads(line) for line in done.lines]
    found = {Path(each["file"]).stem: each["predictions"][0]["label"] for each in results[:-1]}
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert found == {name: str(number) for number, name in enumerate(names)}
    assert (results[-1]["error"].startswith("not a supported image"), done.code, done.err) == (True, 3, "")


@pytest.mark.usefixtures("local_engine")
def test_no_more_images_are_under_way_than_the_queue_takes(
    pvt_serve: PvtServe, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PVT_QUEUE_SIZE", "1")

    done = pvt_serve("predict", "-k", "1", digits)

    assert (done.code, len(done.lines), done.err) == (0, 10, "")


def test_a_service_returns_the_same_classes(
    pvt_serve: PvtServe, service_url: str, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PVT_URL", service_url)

    done = pvt_serve("predict", digits / "seven.png", digits / "one.png")

    assert [line.split()[0] for line in done.lines] == [str(digits / "seven.png"), str(digits / "one.png")]
    assert [line.split()[2] for line in done.lines] == ["7", "1"]
    assert (done.code, done.err) == (0, "")


def test_csv_has_a_row_for_each_class_and_each_error(
    pvt_serve: PvtServe, service_url: str, digits: Path, tmp_path: Path
) -> None:
    odd = tmp_path / 'a,"b.png'
    odd.write_bytes(b"not an image")

    done = pvt_serve("predict", "--url", service_url, "--csv", "-k", "2", digits / "six.png", odd)

    first, second, error = csv.DictReader(done.lines)
    assert (first["rank"], first["label"], second["rank"]) == ("1", "6", "2")
    assert (error["file"], error["rank"]) == (str(odd), "")
    assert "not a supported image" in error["error"]
    assert done.code == 3


def test_a_pattern_may_come_in_quotes(pvt_serve: PvtServe, service_url: str, digits: Path) -> None:
    done = pvt_serve("predict", "--url", service_url, f"{digits.parent}/**/t*.png")

    assert [Path(line.split()[0]).name for line in done.lines] == ["three.png", "two.png"]


def test_a_name_that_is_not_utf_8_is_shown_escaped(
    pvt_serve: PvtServe, service_url: str, digits: Path, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"\xff.png")
    odd.write_bytes((digits / "one.png").read_bytes())

    done = pvt_serve("predict", "--url", service_url, "-k", "1", tmp_path)
    embedded = pvt_serve("embed", "--url", service_url, tmp_path, "-o", tmp_path / "out.npz")

    assert (done.code, done.out.split()[0]) == (0, f"{tmp_path}/\\udcff.png")
    assert (embedded.code, "its name is not UTF-8" in embedded.err) == (3, True)


def test_a_name_with_control_characters_stays_in_its_line_and_moves_no_cursor(
    pvt_serve: PvtServe, service_url: str, digits: Path, tmp_path: Path
) -> None:
    odd, run = tmp_path / "a\x1b[31m\nb.png", ("predict", "--url", service_url, "-k", "1")
    odd.write_bytes((digits / "one.png").read_bytes())

    text, rows, lines = (pvt_serve(*run, *form, tmp_path) for form in ([], ["--csv"], ["--json"]))
    with on_terminal(*run, str(tmp_path)) as shown:
        assert shown.ended() == 0

    assert text.lines == [f"{tmp_path}/a\\x1b[31m\\nb.png{text.lines[0].partition('.png')[2]}"]
    (row,) = csv.DictReader(StringIO(rows.out, newline=""))
    assert (row["file"], row["label"]) == (f"{tmp_path}/a\\x1b[31m\nb.png", "1")
    assert json.loads(lines.out)["file"] == str(odd)
    assert "/a\\x1b[31m\\nb.png" in shown.seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "missing.png: no such file"),
        (["*.nothing"], "*.nothing: no such file"),
        (["."], ".: no images in this folder"),
        (["--json", "--csv", "missing.png"], "--json and --csv exclude each other"),
    ],
)
def test_an_argument_that_names_no_image_is_a_usage_error(
    pvt_serve: PvtServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)

    done = pvt_serve("predict", *arguments)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"pvt-serve: {message}")
    assert done.err.count("\n") == 1


def test_hidden_files_and_other_kinds_are_left_out_of_a_folder(
    pvt_serve: PvtServe, service_url: str, digits: Path, tmp_path: Path
) -> None:
    image = (digits / "one.png").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/x.PNG", ".hidden/x.png", ".x.png", "notes.txt", "a.png"):
        (tmp_path / name).write_bytes(image)

    done = pvt_serve("predict", "--url", service_url, tmp_path)

    assert [line.split()[0] for line in done.lines] == [str(tmp_path / "a.png"), str(tmp_path / "b" / "x.PNG")]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model", "b9"], 2, "no model 'b9'"),
        (["--model", "b2"], 2, "no model 'b2' in the store; did you mean 'pvt_v2_b2'?"),
        (["--url", "localhost:1"], 1, "Start it with `pvt-serve serve`, or give its URL"),
        (["--url", "no-such-host.invalid:80"], 1, "http://no-such-host.invalid was not reached"),
        (["--url", "ftp://localhost"], 2, "http://host:port or unix:/path is expected"),
    ],
)
@pytest.mark.usefixtures("local_engine")
def test_an_error_that_every_image_would_meet_is_one_line_and_ends_the_command(
    pvt_serve: PvtServe, digits: Path, options: list[str], code: int, message: str
) -> None:
    done = pvt_serve("predict", digits, *options)

    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_wrong_key_is_one_line(pvt_serve: PvtServe, digits: Path) -> None:
    with scripted(refused(401, "unauthorized")) as server:
        done = pvt_serve("predict", digits, "--url", server.url, "--key", "wrong")

    assert (done.code, done.err) == (
        1,
        "pvt-serve: unauthorized (401): d; --key, or the variable PVT_KEY, gives a key\n",
    )
    assert server.requests[0].headers["authorization"] == "Bearer wrong"


@pytest.mark.usefixtures("local_engine")
def test_a_wrong_setting_is_a_usage_error(pvt_serve: PvtServe, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_INSTANCES", "-1")

    done = pvt_serve("predict", digits)

    assert (done.code, done.err.startswith("pvt-serve: PVT_INSTANCES=-1: ")) == (2, True)


@pytest.mark.usefixtures("local_engine")
def test_a_local_engine_and_a_service_explain_alike(
    pvt_serve: PvtServe, service_url: str, digits: Path, tmp_path: Path
) -> None:
    command = ("explain", digits / "four.png", "--class", "9", "--alpha", "0.4", "--json")
    local = pvt_serve(*command, "-o", tmp_path / "local.png")
    remote = pvt_serve(*command, "-o", tmp_path / "remote.png", "--url", service_url)

    mine, theirs = (json.loads(each.out) for each in (local, remote))
    assert mine["logit"] == pytest.approx(np.mean(mine["map"]) + mine["bias"], abs=1e-4)
    assert mine["map"] == [pytest.approx(row, abs=0.05) for row in theirs["map"]]  # another backend
    assert (mine["label"], mine["class_id"], mine["model"]) == ("9", 9, "pvt_v2_b0.digits")
    with Image.open(tmp_path / "local.png") as first, Image.open(tmp_path / "remote.png") as second:
        assert first.size == second.size == (128, 128)
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "-", "--json"], "-o - and --json are both for standard output"),
        (["-o", "x.png", "-O"], "-o names the file, and -O has a name for it"),
        (["-o", "nowhere/x.png"], "nowhere/x.png: there is no such folder"),
        (["-o", "x.png", "--size", "33x"], "--size 33x: "),
    ],
)
@pytest.mark.usefixtures("local_engine")
def test_a_missing_or_wrong_option_of_explain_is_one_line(
    pvt_serve: PvtServe, digits: Path, options: list[str], message: str
) -> None:
    done = pvt_serve("explain", digits / "four.png", *options)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"pvt-serve: {message}")
    assert done.err.count("\n") == 1


@pytest.mark.usefixtures("local_engine")
def test_a_class_that_the_model_does_not_have_is_named(pvt_serve: PvtServe, digits: Path) -> None:
    done = pvt_serve("explain", digits / "four.png", "--json", "--class", "10")

    assert (done.code, "has the classes 0 to 9" in done.err) == (2, True)


def test_explain_names_its_file_itself_and_overwrites_none(
    pvt_serve: PvtServe, service_url: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PVT_URL", service_url)
    written = pvt_serve("explain", digits / "four.png")
    first = (tmp_path / "four-explained.png").read_bytes()
    (tmp_path / "four-explained.png").write_bytes(b"mine")
    refused = pvt_serve("explain", digits / "four.png")
    kept = (tmp_path / "four-explained.png").read_bytes()
    forced = pvt_serve("explain", digits / "four.png", "--force", "-O", "--json")
    only_json = pvt_serve("explain", digits / "five.png", "--json")

    assert (written.code, written.out) == (0, "four-explained.png\n")
    assert (refused.code, refused.err) == (
        2, "pvt-serve: four-explained.png exists: --force overwrites it, -o names another file\n",
    )  # fmt: skip
    assert kept == b"mine"
    assert (forced.code, json.loads(forced.out)["label"], (tmp_path / "four-explained.png").read_bytes()) == (
        0, "4", first,
    )  # fmt: skip
    assert only_json.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["four-explained.png"]


def test_a_class_may_be_named_by_its_label(
    pvt_serve: PvtServe, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine, novem")
    relabelled(tmp_path, labels)
    monkeypatch.setenv("PVT_DEFAULT_MODEL", "pvt_v2_b0.named")
    for name, value in {"MODEL_STORE": str(tmp_path), "BACKEND": "torch", "INSTANCES": "1"}.items():
        monkeypatch.setenv(f"PVT_{name}", value)
    by_label = pvt_serve("explain", digits / "four.png", "--json", "--class", "Novem")
    by_number = pvt_serve("explain", digits / "four.png", "--json", "--class", "9")
    wrong = pvt_serve("explain", digits / "four.png", "--json", "--class", "sevn")

    assert json.loads(by_label.out) == json.loads(by_number.out)
    assert json.loads(by_label.out)["class_id"] == 9
    assert (wrong.code, "the nearest are 'seven'" in wrong.err) == (2, True)


def test_a_label_is_found_in_a_service_too(pvt_serve: PvtServe, service_url: str, digits: Path) -> None:
    done = pvt_serve("explain", digits / "four.png", "--json", "--class", "x", "--url", service_url)

    assert (done.code, "no class of pvt_v2_b0.digits is called so" in done.err) == (2, True)


def relabelled(store: Path, labels: tuple[str, ...]) -> None:
    """The embedded model with other labels, as pvt_v2_b0.named in `store`."""
    source = ROOT / "model_store" / "pvt_v2_b0.digits" / "1"
    target = store / "pvt_v2_b0.named" / "1"
    shutil.copytree(source, target)
    card = json.loads((target / "card.json").read_text())
    (target / "card.json").write_text(json.dumps({**card, "id": "pvt_v2_b0.named", "labels": labels}))


def test_the_bar_of_many_images_is_no_part_of_the_result(service_url: str, digits: Path, tmp_path: Path) -> None:
    table = tmp_path / "x.npz"
    with on_terminal("embed", str(digits), "-o", str(table), "--url", service_url) as done:
        assert done.ended() == 0

    assert "10/10" in done.seen
    assert f"{table}: 10 rows" in "".join(done.seen.split("\r\n"))
