"""`pvt-serve ls` and `show`, of a store and of a service: both in the form of `GET /models`."""

import json
from pathlib import Path

import httpx
import pytest

from app.routes.models import ModelDetails, ModelInfo
from service.files import file_sha256
from service.store.store import Store
from tests.cli.conftest import PvtServe
from tests.service.stores import add_model

DIGITS = "pvt_v2_b0.digits"
LONG = "pvt_v2_b2_li.a_model_with_a_name_that_takes_half_of_the_line"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a model of a long name, and one that is broken."""
    add_model(tmp_path, LONG)
    add_model(tmp_path, "pvt_v2_b0.tiny")
    (tmp_path / "pvt_v2_b0.tiny" / "1" / "card.json").write_text("{")
    Store(tmp_path).set_alias("production", f"{LONG}@1")
    monkeypatch.setenv("PVT_MODEL_STORE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("store")
def test_ls_fits_80_columns_with_whole_names_and_reasons_below(
    pvt_serve: PvtServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = pvt_serve("ls", "--all").lines

    assert max(map(len, lines)) <= 80
    assert any(line.startswith(LONG) for line in lines)
    failed = next(number for number, line in enumerate(lines) if line.startswith("pvt_v2_b0.tiny"))
    assert "failed" in lines[failed]
    assert "card.json" in "".join(line.strip() for line in lines[failed + 1 : failed + 5])


@pytest.mark.usefixtures("store")
def test_ls_into_a_pipe_is_plain_rows(pvt_serve: PvtServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    done = pvt_serve("ls")

    assert [line.split()[0] for line in done.lines] == ["model", "pvt_v2_b0.tiny", LONG]
    assert done.out.isascii()
    assert "production" in done.lines[2]
    assert "card.json" in done.lines[1]


@pytest.mark.parametrize("command", ["ls", "models"])
def test_ls_of_a_service_is_what_its_own_list_says(pvt_serve: PvtServe, service_url: str, command: str) -> None:
    expected = [each for each in httpx.get(f"{service_url}/models").json()["models"] if each["state"] != "remote"]

    found = json.loads(pvt_serve(command, "--json", "--url", service_url).out)["models"]

    changing = ("leases", "idle_seconds", "memory_bytes", "versions")
    assert [{name: value for name, value in each.items() if name not in changing} for each in found] == [
        {name: value for name, value in each.items() if name not in changing} for each in expected
    ]


@pytest.mark.usefixtures("local_engine")
def test_the_json_of_a_store_has_the_names_and_values_of_the_service_s(pvt_serve: PvtServe, service_url: str) -> None:
    local, remote = (
        {each["id"]: each for each in json.loads(pvt_serve("ls", "--json", *options).out)["models"]}[DIGITS]
        for options in ((), ("--url", service_url))
    )
    shown, told = (
        json.loads(pvt_serve("show", DIGITS, "--json", *options).out) for options in ((), ("--url", service_url))
    )

    assert {*local} - {"source", "bytes"} <= {*ModelInfo.model_fields}
    assert {*shown} - {"source", "bytes", "weights", "training", "origin"} <= {*ModelDetails.model_fields}
    for mine, theirs in ((local, remote), (shown, told)):
        same = {"id", "variant", "version", "default", "num_classes", "input_size", "parameters", "accuracy", "licence"}
        assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}
    assert (shown["labels"], shown["preprocessing"]) == (told["labels"], told["preprocessing"])


@pytest.mark.usefixtures("local_engine")
def test_show_tells_the_card_and_the_digest_of_the_file(
    pvt_serve: PvtServe, model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    done = pvt_serve("show", "pvt_v2_b0")
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.lines}

    assert lines["sha256"] == file_sha256(model_store / DIGITS / "1" / "model.safetensors")
    assert lines["model"] == f"{DIGITS}@1 (default)"
    assert lines["classes"] == "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert lines["input"] == "64x64, to explain 128x128"
    assert "interpolation bicubic" in lines["preprocessing"]
    assert "top1 0.9861" in lines["accuracy"]


@pytest.mark.usefixtures("store")
def test_show_finds_an_alias_and_lists_labels(pvt_serve: PvtServe) -> None:
    shown = pvt_serve("show", "production")
    labels = pvt_serve("show", LONG, "--labels")

    assert f"{LONG}@1" in shown.lines[0]
    assert any(line.split() == ["aliases", "production"] for line in shown.lines)
    assert [line.split("\t")[0] for line in labels.lines] == [str(number) for number in range(len(labels.lines))]


@pytest.mark.usefixtures("store")
def test_show_of_a_model_that_is_broken_or_not_there_is_one_line(pvt_serve: PvtServe) -> None:
    broken, missing = pvt_serve("show", "pvt_v2_b0.tiny"), pvt_serve("show", "pvt_v2_b0.tony")

    assert (broken.code, broken.err.count("\n"), "card.json" in broken.err) == (1, 1, True)
    assert (missing.code, missing.err.count("\n"), "pvt_v2_b0.tiny" in missing.err) == (2, 1, True)


def test_an_empty_store_is_said_to_be(pvt_serve: PvtServe, tmp_path: Path) -> None:
    done, quiet = pvt_serve("ls", "--store", tmp_path), pvt_serve("ls", "-q", "--store", tmp_path)

    assert (done.code, done.out, quiet.err) == (0, "", "")
    assert done.err.startswith("no models; 'pvt-serve pull'")
