import re
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import PvtServe
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "cli.md").read_text()
# Each line with the number of the lines that it writes.
SHOWN = re.findall(r"^\$ pvt-serve ([^;\n]*)(.*)\n((?:(?!\$|```).*\n)+)", TEXT, re.MULTILINE)


def test_every_command_of_ours_has_its_section() -> None:
    assert {shlex.split(line)[0] for line, *_ in SHOWN} | {"serve"} == {*re.findall(r"^## (\w+)$", TEXT, re.MULTILINE)}


def test_the_lines_of_the_documentation_do_what_is_shown(
    pvt_serve: PvtServe, service_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for name in ("README.md", "broken.png"):
        (tmp_path / name).write_bytes((ROOT / "README.md").read_bytes())
    monkeypatch.chdir(tmp_path)
    for line, _, written in SHOWN:
        arguments = line.replace("http://localhost:8000", service_url).replace("--seconds 5", "--seconds 0.1")
        monkeypatch.setenv("PVT_URL", service_url)

        done = pvt_serve(*shlex.split(arguments))

        code = re.search(r"^exit (\d)$", written, re.MULTILINE)
        assert (line, done.code) == (line, int(code[1]) if code else 0)
        expected = len(written.strip().splitlines()) - bool(code)
        assert (line, len((done.out + done.err).strip().splitlines())) == (line, expected)
