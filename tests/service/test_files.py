import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from service.files import atomic_path, atomic_write, file_sha256, staging_folder
from tests.conftest import ROOT


def test_a_file_is_replaced_when_its_block_ends(tmp_path: Path) -> None:
    (target := tmp_path / "file").write_text("old")

    with atomic_path(target) as new:
        new.write_text("new")
        before = target.read_text()

    assert (before, target.read_text()) == ("old", "new")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("temporary", [None, "other"])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, temporary: str | None) -> None:
    (target := tmp_path / "file").write_text("old")

    def fail() -> None:
        with atomic_path(target, temporary=tmp_path / temporary if temporary else None) as new:
            new.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        fail()

    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_durable_write_syncs_the_file_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    synced: list[tuple[bool, bool]] = []

    def fsync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(target, "text", durable=True)

    assert synced == [(False, False), (True, True)]
    assert target.read_bytes() == b"text"


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (path := tmp_path / "file").write_bytes(b"abc")

    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_staging_folder_goes_with_its_block(tmp_path: Path) -> None:
    with staging_folder(tmp_path, "new-") as folder:
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path

    assert list(tmp_path.iterdir()) == []


def test_where_folders_can_not_be_locked_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # NFS, for a folder

    (tmp_path / "new-other").mkdir()
    monkeypatch.setattr("service.files.fcntl.flock", refused)

    with staging_folder(tmp_path, "new-") as folder:
        assert {path.name for path in tmp_path.iterdir()} == {"new-other", folder.name}


def test_folders_of_those_who_were_killed_go_and_others_stay(tmp_path: Path) -> None:
    code = """
import sys; from pathlib import Path; from service.files import staging_folder
with staging_folder(Path(sys.argv[1]), "new-") as folder:
    (folder / "file").write_text("x")
    print(folder.name, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    (tmp_path / "other").mkdir()
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        name = process.stdout.readline().strip()
        with staging_folder(tmp_path, "new-"):
            assert (tmp_path / name / "file").exists()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert (tmp_path / name / "file").exists()

    with staging_folder(tmp_path, "new-") as mine:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, "other"])
