"""The examples of README, HTTP reference and errors do what is shown."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HTTP = (ROOT / "docs" / "http.md").read_text()
# Each block of commands with what it prints, where that is shown in full.
BLOCKS = re.findall(r"```sh\n(.*?)```\n(?:\n```\n(.*?)```)?", HTTP, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", HTTP, re.DOTALL)
# A page's one command whose response is shown as JSON.
SHOWN = r"```sh\n(curl [^\n]*)\n```\n\n```json\n(.*?)\n```"

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which the examples find what they name, and may write."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    return tmp_path


@needs_curl
def test_the_commands_of_the_http_reference_print_what_is_shown(service_url: str, folder: Path) -> None:
    assert len(BLOCKS) > 5
    for commands, shown in BLOCKS:
        script = commands.replace("localhost:8000", service_url).replace("curl ", "curl -sS --fail-with-body ")
        script = script.replace("python -c", f"{shlex.quote(sys.executable)} -c")
        done = subprocess.run(["bash", "-euc", script], cwd=folder, capture_output=True, text=True, check=False)

        assert (done.returncode, done.stderr) == (0, ""), commands
        if shown and "..." not in shown:
            assert done.stdout == shown
    assert (folder / "eight.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("code", "shown"), PYTHON)
def test_the_python_of_the_http_reference_prints_what_is_shown(
    code: str, shown: str, service_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code = code.replace("http://localhost:8000", service_url)
    code = code.replace("localhost:8000", service_url.removeprefix("http://")).replace("open(", "_opened(")
    printed = io.StringIO()

    with contextlib.ExitStack() as files, contextlib.redirect_stdout(printed):
        names = {"_opened": lambda *arguments: files.enter_context(open(*arguments))}  # noqa: PTH123  as the page has it
        exec(compile(code, "docs/http.md", "exec"), names)  # noqa: S102  our own

    assert _without_last_digits(printed.getvalue()) == _without_last_digits(shown)


@needs_curl
@pytest.mark.parametrize("page", ["README.md", "docs/http.md", "docs/errors.md"])
def test_a_response_is_the_one_that_is_shown(page: str, service_url: str, folder: Path) -> None:
    found = re.search(SHOWN, (ROOT / page).read_text(), re.DOTALL)
    assert found
    command = found[1].replace("localhost:8000", service_url).replace("curl ", "curl -sS ")

    done = subprocess.run(["bash", "-euc", command], cwd=folder, capture_output=True, text=True, check=True)

    assert _comparable(json.loads(done.stdout)) == _comparable(json.loads(found[2]))


def _comparable(value: object) -> object:
    """`value` without request ids, and with numbers to two places: the last digits depend on the processor."""
    if isinstance(value, dict):
        return {name: _comparable(each) for name, each in value.items() if name != "request_id"}
    if isinstance(value, list):
        return [_comparable(each) for each in value]
    return round(value, 2) if isinstance(value, float) else value


def _without_last_digits(text: str) -> str:
    return re.sub(r"(\d\.\d\d\d)\d+", r"\1", text)
