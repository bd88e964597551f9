"""Code run as a user whom permissions bind: root, who runs tests in containers, may read everything."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

NOBODY = 65534
_AS_NOBODY = f"""
import json, os, sys, tempfile
{{imports}}
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
root = __import__("pathlib").Path(sys.argv[1])
{{body}}
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user reaches, which pytest's own are not."""
    folder = Path(mkdtemp(prefix="pvt-open-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def as_nobody(imports: str, body: str, root: Path) -> Any:
    """What `body`, which has `root`, prints as JSON. What it needs is imported while every file can still be read."""
    code = _AS_NOBODY.replace("{imports}", imports).replace("{body}", body)
    if os.geteuid() == 0 and not _may_drop():
        pytest.skip("this container's root can't become another user")
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _may_drop() -> bool:
    drop = [sys.executable, "-c", f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"]
    return subprocess.run(drop, capture_output=True, check=False).returncode == 0
