"""The example of the models page, from training to rollback, does what it says, line by line."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.app.processes import serving
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "models.md").read_text()
EXAMPLE = TEXT.partition("## From training to rollback\n")[2].partition("\n## ")[0]
FITTING = TEXT.partition("## A classifier from a folder\n")[2].partition("\n## ")[0]
SERVE = "pvt-serve serve &"
# torchvision beside a CPU build of torch needs the operators that `tests.vision` defines.
PYTHON = "import runpy, sys; from tests.vision import define_operators; define_operators(); runpy.run_path(sys.argv[1])"
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")


def commands(text: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


@needs_curl
def test_every_line_from_training_to_rollback_does_what_is_said(tmp_path: Path, model_store: Path) -> None:
    shutil.copytree(model_store, tmp_path / "model_store")
    code = re.findall(r"```python\n(.*?)```", EXAMPLE, re.DOTALL)[0]
    shown = re.findall(r"```\n(.*?)\n```", EXAMPLE.partition("**Check.**")[2], re.DOTALL)[0].splitlines()
    (tmp_path / "finetune.py").write_text(code)
    settings = {"PVT_BACKEND": "torch", "PVT_PRECISION": "float32", "PVT_INSTANCES": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}

    def run(line: str) -> str:
        python = shlex.quote(sys.executable)
        line = line.replace("python finetune.py", f"{python} -c {shlex.quote(PYTHON)} finetune.py")
        line = re.sub("^pvt-serve", f"{python} -m cli", line).replace("curl ", "curl -sS --fail-with-body ")
        done = subprocess.run(
            ["bash", "-euc", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
        return done.stdout

    lines = commands(EXAMPLE)
    before, after = lines[: lines.index(SERVE)], lines[lines.index(SERVE) + 1 :]
    printed = "".join(map(run, before)).splitlines()
    with serving(environment=settings, model_store=str(tmp_path / "model_store"), reload_seconds="0.05") as server:
        answers = []
        for line in after:
            answers.append(run(line.replace("localhost:8000", server.url.removeprefix("http://"))))
            if line.startswith("pvt-serve alias"):
                server.event("model_replaced")  # what serves goes on until the other version is loaded
    for line in shown:
        assert any(each.startswith(line.removesuffix("...")) for each in printed), (line, printed)
    expected = [found[1] if (found := re.search(r"# (\"version\":\"\d\")", line)) else "" for line in after]
    assert len([each for each in expected if each]) == 3
    assert all(part in answer for part, answer in zip(expected, answers, strict=True)), answers
    for line in commands(FITTING):
        if not line.startswith("pip "):
            run(line)
    versions = {path.name for path in (tmp_path / "model_store" / "pvt_v2_b0.fitted").iterdir()}
    assert versions == {"1", "2"}
