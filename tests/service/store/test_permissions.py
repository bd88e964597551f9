"""What can't be read fails alone, whatever it is; modes of what is written are as the umask says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import (
    AliasesInvalid,
    CardInvalid,
    ModelNotFound,
    StoreCacheFailed,
    WeightsCorrupt,
    WeightsUnavailable,
)
from service.store.location import write_index
from service.store.store import Store
from tests.service.remotes import TINY, add_small, remote, site
from tests.unprivileged import as_nobody, open_folder

__all__ = ["open_folder"]

READ = "from service.store.store import Store"
VERSIONS = """
store = Store(root)
found = {id_: {v.version: v.failure and f"{type(v.failure).__name__}: {v.failure}" for v in versions}
         for id_, versions in store.contents().versions.items()}
print(json.dumps({"versions": found, "answers": {m.id: m.version for m in store.models()},
                  "one": [v.version for v in store.candidates("pvt_v2_b0.tiny")]}))
"""

BREAK: dict[str, Callable[[Path], object]] = {
    "locked folder": lambda version: version.chmod(0o000),
    "folder without search": lambda version: version.chmod(0o644),
    "locked card": lambda version: (version / "card.json").chmod(0o000),
    "locked weights": lambda version: (version / "model.safetensors").chmod(0o000),
}


@pytest.mark.parametrize("fault", BREAK)
def test_a_version_that_the_service_may_not_read_fails_alone(open_folder: Path, fault: str) -> None:
    add_small(open_folder)
    BREAK[fault](add_small(open_folder, version="2"))
    add_small(open_folder, "pvt_v2_b0.other")

    seen = as_nobody(READ, VERSIONS, open_folder)

    assert "Permission denied" in seen["versions"][TINY]["2"]
    assert seen["versions"][TINY]["1"] is None
    assert seen["versions"]["pvt_v2_b0.other"] == {"1": None}
    assert seen["answers"] == {TINY: "1", "pvt_v2_b0.other": "1"}
    assert seen["one"] == ["1"]


def test_a_model_that_the_service_may_not_read_fails_alone(open_folder: Path) -> None:
    add_small(open_folder)
    add_small(open_folder, "pvt_v2_b0.other").parent.chmod(0o700)
    (open_folder / "lost+found").mkdir(mode=0o700)
    (open_folder / "aliases.json").write_text("{}")
    (open_folder / "aliases.json").chmod(0o000)

    seen = as_nobody(READ, VERSIONS, open_folder)

    assert seen["versions"][TINY] == {"1": None}
    assert "Permission denied" in seen["versions"]["pvt_v2_b0.other"][""]


def test_a_store_that_the_service_may_not_read_says_so(open_folder: Path) -> None:
    (store := open_folder / "store").mkdir(mode=0o700)
    body = """
try:
    Store(root / "store").contents()
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    name, message = as_nobody(READ, body, open_folder)

    assert name == WeightsUnavailable.__name__
    assert f"{str(store)!r} can't be read (Permission denied)" in message


REMOTE = """
store = RemoteStore(RemoteOptions(url=(root / "url").read_text(), cache=root / "cache", cache_bytes=10**9))
failures = []
try:
    found = {v.version: v.failure and str(v.failure) for v in store.versions("pvt_v2_b0.tiny")}
    for version in ("1", "2"):
        try:
            with store.holding(store.find(f"pvt_v2_b0.tiny@{version}")):
                failures.append(None)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
except Exception as error:
    found = f"{type(error).__name__}: {error}"
print(json.dumps([found, failures]))
"""
OPEN = """
from service.store.location import RemoteOptions
from service.store.remote import RemoteStore
import aiohttp, fsspec.implementations.http
"""


@pytest.mark.parametrize("locked", ["2", "2/card.json", "2/model.safetensors"])
def test_a_part_of_the_copy_that_can_not_be_used_fails_alone(folder: Path, open_folder: Path, locked: str) -> None:
    add_small(folder, version="2")
    write_index(folder)
    with site(folder) as server:
        cache = open_folder / "cache"
        store = remote(server.url, cache)
        for version in ("1", "2"):
            with store.holding(store.find(f"{TINY}@{version}")):
                pass
        for path in [cache, *cache.rglob("*")]:
            os.chown(path, 65534, 65534) if os.geteuid() == 0 else None
        path = next(cache.glob(f"*/{TINY}/{locked}"))
        os.chown(path, 0, 0) if os.geteuid() == 0 else None
        path.chmod(0o000)
        (open_folder / "url").write_text(server.url)
        found, failures = as_nobody(OPEN, REMOTE, open_folder)

    assert found["1"] is None
    assert failures[0] is None
    if locked == "2":
        assert "Permission denied" in found["2"]
        assert "CardInvalid" in failures[1]
    else:  # a file in a folder of one's own can be replaced
        assert failures[1] is None


LISTED = """
store = RemoteStore(RemoteOptions(url=f"file://{root / 'store'}", cache=root / "cache", cache_bytes=10**9))
try:
    result = [[m.id, m.version, m.failure and str(m.failure)] for ms in store.contents().versions.values() for m in ms]
except Exception as error:
    result = f"{type(error).__name__}: {error}"
print(json.dumps(result))
"""


@pytest.mark.parametrize("locked", ["1", "2", "pvt_v2_b0.other", "lost+found", "."])
def test_what_may_not_be_listed_of_a_store_by_url_fails_alone(open_folder: Path, locked: str) -> None:
    store = open_folder / "store"
    for model, version in [(TINY, "1"), (TINY, "2"), ("pvt_v2_b0.other", "1")]:
        add_small(store, model, version)
    (store / "lost+found").mkdir()
    (store / (f"{TINY}/{locked}" if locked.isdigit() else locked)).chmod(0o000)

    result = as_nobody(OPEN, LISTED, open_folder)

    whole = [["pvt_v2_b0.other", "1", None], [TINY, "2", None], [TINY, "1", None]]
    if locked == ".":
        assert result.startswith("StoreUnreachable")
        assert "permission denied" in result
    elif locked == "pvt_v2_b0.other":
        assert [each[:2] for each in result] == [["pvt_v2_b0.other", ""], [TINY, "2"], [TINY, "1"]]
        assert "pvt_v2_b0.other/card.json: permission denied" in result[0][2]
        assert result[1:] == whole[1:]
    else:
        failed = [each for each in result if each[2]]
        assert [each[:2] for each in result] == [each[:2] for each in whole]
        assert [each[:2] for each in failed] == ([[TINY, locked]] if locked.isdigit() else [])
        assert all("permission denied" in each[2] for each in failed)


def test_a_cache_folder_that_can_not_be_written_is_reported_as_such(folder: Path, open_folder: Path) -> None:
    write_index(folder)
    (open_folder / "cache").mkdir(mode=0o755)
    with site(folder) as server:
        (open_folder / "url").write_text(server.url)
        found, _ = as_nobody(OPEN, REMOTE, open_folder)

    assert found.startswith(StoreCacheFailed.__name__)
    assert "PVT_STORE_CACHE_DIR" in found


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def looping(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [dangling, looping, Path.touch])
def test_a_version_that_is_no_folder_fails_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    add_small(tmp_path)
    make(tmp_path / TINY / "2")

    newest, first = Store(tmp_path).versions(TINY)

    assert isinstance(newest.failure, CardInvalid)
    assert first.failure is None
    assert Store(tmp_path).find(TINY).version == "1"


@pytest.mark.parametrize("make", [dangling, looping, Path.mkdir])
@pytest.mark.parametrize("name", ["card.json", "model.safetensors"])
def test_a_file_that_is_none_fails_its_version_alone(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    add_small(tmp_path)
    file = add_small(tmp_path, version="2") / name
    file.unlink()
    make(file)

    newest, first = Store(tmp_path).versions(TINY)

    assert isinstance(newest.failure, CardInvalid | WeightsCorrupt)
    assert str(file) in str(newest.failure)
    assert first.failure is None


@pytest.mark.parametrize("make", [dangling, looping])
def test_a_model_that_leads_nowhere_fails_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    add_small(tmp_path)
    make(tmp_path / "pvt_v2_b0.other")
    (tmp_path / "pvt_v2_b2.safetensors").touch()
    (tmp_path / "lost+found").mkdir()

    broken, fine = Store(tmp_path).models()

    assert (fine.id, fine.failure) == (TINY, None)
    assert (broken.id, type(broken.failure)) == ("pvt_v2_b0.other", CardInvalid)


@pytest.mark.parametrize("make", [dangling, looping, Path.mkdir])
def test_aliases_that_can_not_be_read_leave_the_models(tmp_path: Path, make: Callable[[Path], None]) -> None:
    add_small(tmp_path)
    make(tmp_path / "aliases.json")

    contents = Store(tmp_path).contents()

    assert isinstance(contents.aliases_failure, AliasesInvalid)
    assert [model.failure for model in Store(tmp_path).models()] == [None]


def test_a_name_longer_than_any_file_may_have_is_not_found(tmp_path: Path) -> None:
    add_small(tmp_path)

    with pytest.raises(ModelNotFound, match="no model"):
        Store(tmp_path).find(f"pvt_v2_b0.{'x' * 300}")


WRITE = """
import os, sys, threading
from pathlib import Path
os.umask(int(sys.argv[2], 8))
import torch
from service.acquisition.importing import ImportOptions, import_model
from service.acquisition.preprocessing import PreprocessingOptions
from service.architecture.pvt_v2 import create
from service.store.location import write_index
from service.store.store import Store
from service.store.remote import RemoteOptions, RemoteStore
root = Path(sys.argv[1])
torch.save(create("pvt_v2_b0", num_classes=2).state_dict(), root / "mine.pth")
size = PreprocessingOptions(height=32, width=32)
import_model(root / "store", ImportOptions(file=root / "mine.pth", variant="b0", tag="mine", preprocessing=size))
Store(root / "store").set_alias("production", "pvt_v2_b0.mine@1")
write_index(root / "store")
remote = RemoteStore(RemoteOptions(url=f"file://{root / 'store'}", cache=root / "cache", cache_bytes=10**9))
with remote.holding(remote.find("pvt_v2_b0.mine")):
    pass
"""


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_all_that_is_written_has_the_modes_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path), f"{umask:o}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

    for path in [path for part in ("store", "cache") for path in (tmp_path / part).rglob("*")]:
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert (str(path), oct(path.stat().st_mode & 0o777)) == (str(path), oct(wanted))
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"card.json", "model.safetensors", "reference.safetensors", "aliases.json", "index.json"} <= written
    assert json.loads((tmp_path / "store" / "index.json").read_text())["files"]


def test_an_index_that_would_leave_a_version_out_is_not_written(open_folder: Path) -> None:
    add_small(open_folder)
    add_small(open_folder, version="2").chmod(0o000)
    body = """
try:
    write_index(root)
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    name, message = as_nobody("from service.store.location import write_index", body, open_folder)

    assert name == WeightsUnavailable.__name__
    assert f"{TINY}/2" in message
    assert not (open_folder / "index.json").exists()


def test_a_store_without_listing_still_has_what_is_named(open_folder: Path) -> None:
    add_small(open_folder / "store")
    (open_folder / "store").chmod(0o711)
    body = """
store = Store(root / "store")
try:
    store.contents()
except Exception as error:
    print(json.dumps([type(error).__name__, [v.version for v in store.candidates("pvt_v2_b0.tiny")]]))
"""
    assert as_nobody(READ, body, open_folder) == [WeightsUnavailable.__name__, ["1"]]
