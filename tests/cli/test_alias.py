import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import PvtServe
from tests.service.stores import add_model

TINY = "pvt_v2_b0.tiny"
Alias = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With two versions of a model."""
    folder = add_model(tmp_path, TINY)
    shutil.copytree(folder, folder.parent / "2", copy_function=os.link)
    monkeypatch.setenv("PVT_MODEL_STORE", str(tmp_path))
    return tmp_path


@pytest.fixture
def alias(pvt_serve: PvtServe) -> Alias:
    """What `pvt-serve alias` prints."""

    def run(*arguments: str) -> str:
        done = pvt_serve("alias", *arguments)
        assert done.code == 0, done.err
        return done.out.rstrip("\n")

    return run


def test_an_alias_is_set_shown_changed_and_removed(alias: Alias, store: Path) -> None:
    assert alias() == "no aliases"
    assert alias("production", f"{TINY}@1") == f"production -> {TINY}@1"
    assert json.loads((store / "aliases.json").read_text()) == {"production": f"{TINY}@1"}
    assert alias("production") == f"{TINY}@1"
    assert alias("production", f"{TINY}@2") == f"production -> {TINY}@2 (was {TINY}@1)"
    assert alias("production", "--rm") == f"production is removed (was {TINY}@2)"
    assert alias() == "no aliases"


@pytest.mark.usefixtures("store")
def test_all_aliases_are_listed_with_what_they_mean_now(alias: Alias) -> None:
    alias("production", f"{TINY}@1")
    alias("canary", TINY)

    assert alias().splitlines() == [f"canary      {TINY}    ({TINY}@2)", f"production  {TINY}@1"]
    assert json.loads(alias("--json")) == {"canary": TINY, "production": f"{TINY}@1"}


def test_an_alias_of_a_missing_or_broken_model_is_listed_with_the_reason(alias: Alias, store: Path) -> None:
    alias("production", f"{TINY}@1")
    alias("canary", f"{TINY}@2")
    shutil.rmtree(store / TINY / "1")
    (store / TINY / "2" / "model.safetensors").unlink()

    canary, production = alias().splitlines()

    assert "failed: " in canary
    assert "No such file" in canary
    assert "has no version '1'; there are: 2" in production


@pytest.mark.parametrize("arguments", [("--rm",), ("production", TINY, "--rm"), ("a", "b", "c")])
def test_a_wrong_use_is_refused(pvt_serve: PvtServe, store: Path, arguments: tuple[str, ...]) -> None:
    assert pvt_serve("alias", *arguments).code == 2
    assert not (store / "aliases.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prod",), "no alias 'prod'"),
        (("prod", "--rm"), "no alias 'prod'"),
        (("prod", f"{TINY}@7"), "has no version '7'"),
    ],
)
@pytest.mark.usefixtures("store")
def test_an_alias_or_model_that_does_not_exist_is_an_error(
    pvt_serve: PvtServe, arguments: tuple[str, ...], message: str
) -> None:
    done = pvt_serve("alias", *arguments)

    assert (done.code, done.out, message in done.err) == (2, "", True)


def test_broken_aliases_are_left_as_they_are(pvt_serve: PvtServe, store: Path) -> None:
    (store / "aliases.json").write_text("{")
    done = pvt_serve("alias", "production", TINY)

    assert (done.code, "aliases.json: " in done.err) == (1, True)
    assert (store / "aliases.json").read_text() == "{"


def test_an_unknown_setting_is_a_wrong_use(pvt_serve: PvtServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_MODEL_STOR", "x")
    done = pvt_serve("alias")

    assert (done.code, "PVT_MODEL_STORE" in done.err) == (2, True)
