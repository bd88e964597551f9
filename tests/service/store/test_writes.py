import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.store.writes import staging
from tests.conftest import ROOT


def test_a_staging_folder_goes_with_its_block(tmp_path: Path) -> None:
    with staging(tmp_path, "new-") as folder:
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path

    assert list(tmp_path.iterdir()) == []


def test_where_folders_can_not_be_locked_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # NFS, for a folder

    (tmp_path / "new-other").mkdir()
    monkeypatch.setattr("service.store.writes.fcntl.flock", refused)

    with staging(tmp_path, "new-") as folder:
        assert {path.name for path in tmp_path.iterdir()} == {"new-other", folder.name}


def test_folders_of_those_who_were_killed_go_and_others_stay(tmp_path: Path) -> None:
    code = """
import sys; from pathlib import Path; from service.store.writes import staging
with staging(Path(sys.argv[1]), "new-") as folder:
    (folder / "file").write_text("x")
    print(folder.name, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    (tmp_path / "other").mkdir()
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        name = process.stdout.readline().strip()
        with staging(tmp_path, "new-"):
            assert (tmp_path / name / "file").exists()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert (tmp_path / name / "file").exists()

    with staging(tmp_path, "new-") as mine:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, "other"])
