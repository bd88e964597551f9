import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from filelock import FileLock

from service.errors import (
    AliasesInvalid,
    InvalidRequest,
    ModelNotFound,
    StoreNotWritable,
    WeightsCorrupt,
    WeightsUnavailable,
)
from service.store.store import Store
from tests.conftest import ROOT
from tests.service.stores import add_model

TINY = "pvt_v2_b0.tiny"
NOBODY = 65534


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_model(tmp_path_factory.mktemp("store"), TINY)


@pytest.fixture
def store(tmp_path: Path, weights: Path) -> Store:
    for version in ("1", "2"):
        add_version(tmp_path, weights, version)
    return Store(tmp_path)


def add_version(root: Path, weights: Path, version: str) -> None:
    """A copy that shares its bytes, which makes many stores cheap."""
    shutil.copytree(weights, root / TINY / version, copy_function=os.link)


def test_an_alias_stands_for_a_version(store: Store) -> None:
    store.set_alias("production", f"{TINY}@1")

    assert store.aliases() == {"production": f"{TINY}@1"}
    assert store.find("production").key == f"{TINY}@1"


def test_an_alias_of_a_model_follows_its_newest_version(store: Store, weights: Path) -> None:
    store.set_alias("canary", TINY)
    before = store.find("canary").version
    add_version(store.root, weights, "3")

    assert (before, store.find("canary").version) == ("2", "3")
    assert [model.version for model in store.candidates("canary")] == ["3", "2", "1"]


def test_an_alias_is_changed_and_removed_and_the_others_stay(store: Store) -> None:
    store.set_alias("production", f"{TINY}@1")
    store.set_alias("canary", TINY)
    store.set_alias("production", f"{TINY}@2")
    store.remove_alias("canary")

    assert store.aliases() == {"production": f"{TINY}@2"}


def test_the_contents_tell_which_aliases_a_model_and_a_version_have(store: Store) -> None:
    for name, target in {"b": f"{TINY}@1", "a": f"{TINY}@1", "c": TINY}.items():
        store.set_alias(name, target)

    contents = store.contents()

    assert contents.aliases_of(f"{TINY}@1") == ["a", "b"]
    assert contents.aliases_of(f"{TINY}@2") == []
    assert contents.aliases_of(TINY) == ["c"]


@pytest.mark.parametrize(
    "name", ["pvt_v2_b2", "pvt_v2_b0.tiny", "a@1", "", ".", "..", "a/b", "-a", "a b", "ä", "a" * 65]
)
def test_an_alias_that_could_be_a_model_or_a_path_is_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidRequest, match="alias"):
        store.set_alias(name, TINY)

    assert store.aliases() == {}


@pytest.mark.parametrize("target", ["pvt_v2_b0", "production", "", f"{TINY}@", f"{TINY}@0", "../x.y", f"{TINY}@1@1"])
def test_an_alias_stands_for_a_model_or_a_version_only(store: Store, target: str) -> None:
    with pytest.raises(InvalidRequest, match="alias target"):
        store.set_alias("production", target)


def test_an_alias_is_not_set_to_a_missing_model(store: Store) -> None:
    with pytest.raises(ModelNotFound, match="has no version '9'; there are: 2, 1"):
        store.set_alias("production", f"{TINY}@9")
    with pytest.raises(WeightsUnavailable):
        store.set_alias("production", "pvt_v2_b5.in1k")
    with pytest.raises(ModelNotFound, match=r"no model 'pvt_v2_b0.tni'"):
        store.set_alias("production", "pvt_v2_b0.tni")

    assert store.aliases() == {}


def test_an_alias_is_not_set_to_a_broken_model(store: Store) -> None:
    (store.root / TINY / "2" / "model.safetensors").unlink()

    with pytest.raises(WeightsCorrupt):
        store.set_alias("production", f"{TINY}@2")


def test_removing_a_missing_alias_names_the_others(store: Store) -> None:
    store.set_alias("production", TINY)

    with pytest.raises(ModelNotFound, match="no alias 'prod'; there are: 'production'"):
        store.remove_alias("prod")


def test_an_alias_whose_model_is_gone_says_what_it_stands_for(store: Store) -> None:
    (store.root / "aliases.json").write_text(json.dumps({"production": "pvt_v2_b1.gone@3", "old": f"{TINY}@9"}))

    with pytest.raises(
        ModelNotFound, match=r"alias 'production' stands for 'pvt_v2_b1.gone@3', which is not in the store"
    ):
        store.find("production")
    with pytest.raises(ModelNotFound, match="has no version '9'"):
        store.find("old")


def test_an_unknown_alias_is_not_found_and_the_nearest_one_named(store: Store) -> None:
    store.set_alias("production", TINY)

    with pytest.raises(ModelNotFound, match="did you mean 'production'"):
        store.find("producton")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Invalid JSON"),
        ("[]", "the file: Input should be an object"),
        ('{"production": 2}', "production: Input should be a valid string"),
        ('{"production": "canary"}', "alias target 'canary': it must be <variant>.<tag>"),
        ('{"pvt_v2_b2": "pvt_v2_b0.tiny"}', "that is a variant's name"),
        ('{"a": "' + "x" * 1_000_000 + '"}', "larger than"),
        (b"\xff\xfe", "Invalid JSON"),
    ],
)
def test_broken_aliases_are_reported_to_requests_for_one_and_to_no_other(
    store: Store, content: str | bytes, reason: str
) -> None:
    path = store.root / "aliases.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(AliasesInvalid, match=reason):
        store.find("production")
    with pytest.raises(AliasesInvalid, match=reason):
        store.set_alias("canary", TINY)

    assert reason in str(store.contents().aliases_failure)
    assert [model.key for model in store.models()] == [f"{TINY}@2"]
    assert store.find(f"{TINY}@1").version == "1"
    assert store.find("pvt_v2_b0").version == "2"
    with pytest.raises(ModelNotFound, match=r"no model 'pvt_v2_b0.tni'"):
        store.find("pvt_v2_b0.tni")


def test_a_pipe_in_place_of_the_aliases_is_not_waited_for(store: Store) -> None:
    os.mkfifo(store.root / "aliases.json")

    with pytest.raises(AliasesInvalid, match="no regular file"):
        store.find("production")


def test_changes_at_the_same_time_are_all_kept(store: Store) -> None:
    names = [f"alias{i}" for i in range(20)]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: Store(store.root).set_alias(name, TINY), names))

    assert sorted(store.aliases()) == sorted(names)


def test_changes_of_several_processes_are_all_kept(store: Store) -> None:
    code = "import sys; from service.store.store import Store; from pathlib import Path\n"
    code += f"for i in range(20): Store(Path(sys.argv[1])).set_alias(f'{{sys.argv[2]}}{{i}}', {TINY!r})"
    children = [subprocess.Popen([sys.executable, "-c", code, store.root, name], cwd=ROOT) for name in "abc"]

    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert len(store.aliases()) == 60


def test_a_writer_that_is_killed_in_the_middle_leaves_the_old_aliases_and_no_lock(store: Store) -> None:
    store.set_alias("production", f"{TINY}@1")
    code = "import os, signal, sys; from service.store.store import Store; from pathlib import Path\n"
    code += "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += f"Store(Path(sys.argv[1])).set_alias('production', '{TINY}@2')"

    killed = subprocess.run([sys.executable, "-c", code, store.root], cwd=ROOT, check=False)

    assert killed.returncode == -9
    assert store.aliases() == {"production": f"{TINY}@1"}
    store.set_alias("production", f"{TINY}@2")
    assert store.aliases() == {"production": f"{TINY}@2"}
    assert not [path.name for path in store.root.iterdir() if path.name.endswith(".new")]


def test_a_full_disk_leaves_the_aliases_as_they_were(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.set_alias("production", f"{TINY}@1")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)

    with pytest.raises(
        StoreNotWritable, match=r"can't be written \(No space left on device\) and its aliases are as they"
    ):
        store.set_alias("production", f"{TINY}@2")

    assert store.aliases() == {"production": f"{TINY}@1"}
    assert not [path.name for path in store.root.iterdir() if path.name.endswith(".new")]


def test_a_lock_that_is_held_is_not_waited_for_without_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.store.store.LOCK_SECONDS", 0.0)

    with FileLock(store.root / ".aliases.lock"), pytest.raises(StoreNotWritable, match="held by another process"):
        store.set_alias("production", TINY)


def test_a_read_only_store_says_so_and_goes_on_reading_its_aliases(weights: Path) -> None:
    """In a process without root's rights, which no permission stops."""
    code = "import os, sys; from pathlib import Path; from service.errors import StoreNotWritable\n"
    code += "from service.store.store import Store\n"
    code += f"os.getuid() or os.setuid({NOBODY})\n"
    code += "store = Store(Path(sys.argv[1])); print(store.aliases()['production'])\n"
    code += f"try: store.set_alias('production', '{TINY}@2')\n"
    code += "except StoreNotWritable as error: print(error)"
    with TemporaryDirectory() as name:  # whose parents every user may enter
        root = Path(name)
        for version in ("1", "2"):
            add_version(root, weights, version)
        Store(root).set_alias("production", f"{TINY}@1")
        root.chmod(0o555)

        done = subprocess.run([sys.executable, "-c", code, root], cwd=ROOT, check=True, capture_output=True, text=True)

        root.chmod(0o755)
        found, refused = done.stdout.splitlines()
        assert found == f"{TINY}@1"
        assert (
            f"the model store '{root}' can't be written (Permission denied) and its aliases are as they were" in refused
        )
        assert Store(root).aliases() == {"production": f"{TINY}@1"}


def test_other_users_may_read_the_aliases(store: Store) -> None:
    store.set_alias("production", TINY)

    assert (store.root / "aliases.json").stat().st_mode & 0o044
