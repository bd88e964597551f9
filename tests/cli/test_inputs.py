"""What images a command finds: on standard input, in lists, folders and patterns; through `predict` to a service."""

import json
import os
import subprocess
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from tests.cli.conftest import Done, PvtServe
from tests.cli.terminals import command
from tests.conftest import ROOT
from tests.pvt_client.scripted import predicted, scripted

Piped = Callable[..., Done]


@pytest.fixture
def piped(pvt_serve: PvtServe, monkeypatch: pytest.MonkeyPatch) -> Piped:
    """Runs a command with data on its standard input: piped(data, "predict", "-")."""

    def run(data: bytes, *arguments: str | Path) -> Done:
        with monkeypatch.context() as context, TextIOWrapper(BytesIO(data)) as stdin:
            context.setattr("sys.stdin", stdin)
            return pvt_serve(*arguments)

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images of these names, and a folder in it."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.png", "b c.png", "d\ne.png", os.fsdecode(b"\xff.png"), "deep/f.png"):
        (tmp_path / "in" / name).write_bytes(b"image")
    return tmp_path / "in"


def files(done: Done) -> list[str]:
    assert done.code == 0, done.err
    return [json.loads(line)["file"] for line in done.lines]


def test_an_image_on_standard_input_is_answered_as_from_its_file(piped: Piped, service_url: str, digits: Path) -> None:
    data = (digits / "seven.png").read_bytes()
    common = ("--url", service_url, "--json")
    answered = piped(data, "predict", "-", digits / "seven.png", *common)

    first, second = (json.loads(line) for line in answered.lines)
    assert (first["file"], second["file"]) == ("-", str(digits / "seven.png"))
    assert first["predictions"] == second["predictions"]


def test_embed_takes_standard_input_too(piped: Piped, service_url: str, digits: Path, tmp_path: Path) -> None:
    data = (digits / "seven.png").read_bytes()
    table = tmp_path / "x.npz"
    embedded = piped(data, "embed", "-", digits / "one.png", "-o", table, "--url", service_url)
    again = piped(data, "embed", "-", digits / "one.png", "-o", table, "--url", service_url)

    assert embedded.out == f"{table}: 2 rows, 2 of them new, 0 skipped, 0 bad\n"
    assert again.out == f"{table}: 2 rows, 1 of them new, 1 skipped, 0 bad\n"  # what - was is not known


def test_an_overlay_goes_from_standard_input_to_standard_output(
    pvt_serve: PvtServe, service_url: str, digits: Path, tmp_path: Path
) -> None:
    data = (digits / "two.png").read_bytes()
    through = command(["explain", "-", "--url", service_url, "-o", "-"])
    done = subprocess.run(through, cwd=ROOT, input=data, capture_output=True, check=True)
    pvt_serve("explain", digits / "two.png", "--url", service_url, "-o", tmp_path / "x.png")

    assert done.stdout == (tmp_path / "x.png").read_bytes()
    assert done.stdout.startswith(b"\x89PNG")


def test_lists_have_names_by_lines_or_nul_and_folders(
    images: Path, pvt_serve: PvtServe, piped: Piped, tmp_path: Path
) -> None:
    by_nul = subprocess.run(["find", images, "-name", "*.png", "-print0"], capture_output=True, check=True).stdout
    (tmp_path / "nul.txt").write_bytes(by_nul)
    (tmp_path / "lines.txt").write_bytes(f"{images}/a.png\r\n\n{images}/b c.png\n{images}/deep\n".encode())
    with scripted(predicted()) as server:
        common = ("--url", server.url, "--json")
        from_nul = files(pvt_serve("predict", "--files-from", tmp_path / "nul.txt", *common))
        from_lines = files(pvt_serve("predict", "--files-from", tmp_path / "lines.txt", images / "a.png", *common))
        from_pipe = files(piped(by_nul, "predict", "--files-from", "-", *common))

    assert sorted(from_nul) == sorted(from_pipe) == sorted(map(os.fsdecode, filter(None, by_nul.split(b"\0"))))
    assert len(from_nul) == 5
    assert from_lines == [f"{images}/{name}" for name in ("a.png", "a.png", "b c.png", "deep/f.png")]


def test_what_a_list_names_and_is_not_there_fails_by_itself(
    piped: Piped, images: Path, service_url: str, digits: Path
) -> None:
    done = piped(
        f"{images}/nowhere.png\n{digits}/one.png".encode(), "predict", "--files-from", "-", "--url", service_url
    )

    assert done.code == 3
    assert "nowhere.png  no result: " in done.lines[0]
    assert "1" in done.lines[1]


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        (["-"], b"", "standard input is empty"),
        (["-", "-"], b"x", "can be only one image or one list"),
        (["-", "--files-from", "-"], b"x", "can be only one image or one list"),
        (["--files-from", "-"], b"\n\n", "-: no files are listed"),
        (["--files-from", "nowhere.txt"], b"", "--files-from nowhere.txt: No such file"),
        (["--files-from", "docs"], b"", "--files-from docs: Is a directory"),
        ([], b"", "name images, folders, or - for standard input"),
    ],
)
def test_standard_input_that_can_not_be_is_refused(
    piped: Piped, arguments: list[str], data: bytes, message: str
) -> None:
    done = piped(data, "predict", *arguments)

    assert (done.code, done.out, done.err.count("\n"), message in done.err) == (2, "", 1, True)
