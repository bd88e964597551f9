from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cli.remote import register
from cli.terminal import CommandError
from service.store.index import StoreIndex
from tests.service.remotes import add_small


def index(*arguments: str) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_index_lists_every_file_of_every_model_and_the_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_small(tmp_path)
    (tmp_path / "aliases.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (folder / ".hidden").touch()
    monkeypatch.setenv("PVT_MODEL_STORE", str(tmp_path))

    told = index()

    assert "index.json: 3 files, 0.1 MB" in told
    files = StoreIndex.model_validate_json((tmp_path / "index.json").read_bytes()).files
    assert [file.path for file in files] == [
        "pvt_v2_b0.tiny/1/card.json",
        "pvt_v2_b0.tiny/1/model.safetensors",
        "aliases.json",
    ]


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="can't be read"):
        index(str(tmp_path / "nowhere"))


def test_a_store_by_url_is_not_indexed_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_MODEL_STORE", "memory://store")

    with pytest.raises(CommandError, match="name the FOLDER"):
        index()
