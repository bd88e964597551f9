import json
import os
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from cli.aliases import register
from service.errors import AliasesInvalid, ModelNotFound, ServiceError
from tests.service.stores import add_model

TINY = "pvt_v2_b0.tiny"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With two versions of a model."""
    folder = add_model(tmp_path, TINY)
    shutil.copytree(folder, folder.parent / "2", copy_function=os.link)
    monkeypatch.setenv("PVT_MODEL_STORE", str(tmp_path))
    return tmp_path


def alias(*arguments: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    return CliRunner().invoke(app, arguments)


def said(*arguments: str) -> str:
    result = alias(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.rstrip("\n")


def test_an_alias_is_set_shown_changed_and_removed(store: Path) -> None:
    assert said() == "no aliases"
    assert said("production", f"{TINY}@1") == f"production -> {TINY}@1"
    assert json.loads((store / "aliases.json").read_text()) == {"production": f"{TINY}@1"}
    assert said("production") == f"{TINY}@1"
    assert said("production", f"{TINY}@2") == f"production -> {TINY}@2 (was {TINY}@1)"
    assert said("production", "--rm") == f"production is gone (was {TINY}@2)"
    assert said() == "no aliases"


@pytest.mark.usefixtures("store")
def test_all_aliases_are_listed_with_what_they_mean_now() -> None:
    said("production", f"{TINY}@1")
    said("canary", TINY)

    assert said().splitlines() == [f"canary      {TINY}    ({TINY}@2)", f"production  {TINY}@1"]
    assert json.loads(said("--json")) == {"canary": TINY, "production": f"{TINY}@1"}


def test_an_alias_of_what_is_gone_or_broken_is_listed_with_the_reason(store: Path) -> None:
    said("production", f"{TINY}@1")
    said("canary", f"{TINY}@2")
    shutil.rmtree(store / TINY / "1")
    (store / TINY / "2" / "model.safetensors").unlink()

    canary, production = said().splitlines()

    assert "failed: " in canary
    assert "No such file" in canary
    assert "has no version '1'; there are: 2" in production


@pytest.mark.parametrize("arguments", [("--rm",), ("production", TINY, "--rm"), ("a", "b", "c")])
def test_a_wrong_use_is_told(store: Path, arguments: tuple[str, ...]) -> None:
    assert alias(*arguments).exit_code == 2
    assert not (store / "aliases.json").exists()


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [(("prod",), ModelNotFound), (("prod", "--rm"), ModelNotFound), (("prod", f"{TINY}@7"), ModelNotFound)],
)
@pytest.mark.usefixtures("store")
def test_what_is_not_there_is_an_error(arguments: tuple[str, ...], kind: type[ServiceError]) -> None:
    result = alias(*arguments)

    assert result.exit_code == 1
    assert isinstance(result.exception, kind)


def test_broken_aliases_are_left_as_they_are(store: Path) -> None:
    (store / "aliases.json").write_text("{")

    assert isinstance(alias("production", TINY).exception, AliasesInvalid)
    assert (store / "aliases.json").read_text() == "{"


def test_an_unknown_setting_is_a_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_MODEL_STOR", "x")

    result = alias()

    assert result.exit_code == 2
    assert "PVT_MODEL_STORE" in result.output
