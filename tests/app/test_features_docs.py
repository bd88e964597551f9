"""The lines of docs/features.md do what it shows."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "features.md").read_text()
# Each block of lines with what it prints, where that is shown in full.
BLOCKS = re.findall(r"```sh\n(.*?)```\n(?:\n```\n(.*?)```)?", TEXT, re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_lines_print_what_is_shown(service_url: str, tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    assert len(BLOCKS) > 3
    for lines, shown in BLOCKS:
        script = lines.replace("localhost:8000", service_url).replace("curl ", "curl -sS --fail-with-body ")
        script = script.replace("python -c", f"{shlex.quote(sys.executable)} -c")
        done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=False)

        assert (done.returncode, done.stderr) == (0, ""), lines
        if shown and "..." not in shown:
            assert done.stdout == shown
    assert (tmp_path / "eight.png").read_bytes().startswith(b"\x89PNG")
