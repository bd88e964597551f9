import os
import shutil
from pathlib import Path

import pytest

from service.errors import StoreNotWritable
from service.store.folder import default_store, writable_default_store, writing
from service.store.location import write_index
from service.store.store import EMBEDDED_STORE, Store
from tests.unprivileged import as_nobody, open_folder

__all__ = ["open_folder"]

DIGITS = "pvt_v2_b0.digits"


@pytest.fixture(autouse=True)
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's own store would lie; the current folder is an empty one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home/.local/share/pvt-serve/model_store"


def test_the_store_in_the_current_folder_goes_before_the_user_s_and_that_before_the_package_s(users: Path) -> None:
    found = [default_store()]
    users.mkdir(parents=True)
    found.append(default_store())
    Path("model_store").mkdir()
    found.append(default_store())

    assert found == [EMBEDDED_STORE, users, Path("model_store")]
    assert writable_default_store() == (Path("model_store"), False)


def test_the_package_s_store_has_the_embedded_model_alone() -> None:
    assert [model.id for model in Store(EMBEDDED_STORE).models()] == [DIGITS]


def test_the_user_s_store_is_made_once_with_a_copy_of_the_embedded_model(users: Path) -> None:
    assert writable_default_store() == (users, True)
    assert writable_default_store() == (users, False)

    (copied,) = Store(users).models()
    assert copied.id == DIGITS
    assert not copied.folder.is_symlink()
    assert [each.name for each in users.parent.iterdir()] == ["model_store"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_copy_has_the_modes_that_the_umask_gives(
    users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    package = shutil.copytree(EMBEDDED_STORE, tmp_path / "package")
    for path in [*package.rglob("*"), package]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setattr("service.store.folder.EMBEDDED_STORE", package)

    before = os.umask(umask)
    try:
        writable_default_store()
    finally:
        os.umask(before)

    for path in [users, *users.rglob("*")]:
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert (path.name, oct(path.stat().st_mode & 0o777)) == (path.name, oct(wanted))


def test_a_folder_or_a_home_of_another_user_leaves_the_package_s_store(open_folder: Path) -> None:
    (open_folder / "private" / ".local").mkdir(parents=True)
    (open_folder / "private").chmod(0o700)
    os.chown(open_folder / "private", 0, 0) if os.geteuid() == 0 else (open_folder / "private").chmod(0o000)
    body = """
os.environ["HOME"] = str(root / "private")
print(json.dumps(str(default_store())))
"""
    work = f"import os; os.chdir({str(open_folder / 'private')!r})" if os.geteuid() == 0 else ""

    found = as_nobody(f"from service.store.folder import default_store; {work}", body, open_folder)

    assert found == str(EMBEDDED_STORE)


def test_a_home_that_can_not_be_written_is_an_error_that_says_what_to_do(users: Path) -> None:
    (users.parent.parent.parent).mkdir(parents=True)
    (users.parent.parent).write_text("a file")

    with pytest.raises(StoreNotWritable, match=r"pvt-serve/model_store' can't be written"):
        writable_default_store()


def test_without_a_home_the_package_s_store_is_read_and_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)

    assert default_store() == EMBEDDED_STORE
    assert writable_default_store() == (EMBEDDED_STORE, False)


def test_nothing_is_written_into_the_package_s_store() -> None:
    with pytest.raises(StoreNotWritable, match="part of the package and read only"), writing(EMBEDDED_STORE):
        pass
    with pytest.raises(StoreNotWritable, match="part of the package"):
        Store(EMBEDDED_STORE).set_alias("production", DIGITS)
    with pytest.raises(StoreNotWritable, match="part of the package"):
        write_index(EMBEDDED_STORE)
