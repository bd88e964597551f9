import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from service.errors import ServiceError, StoreCacheFailed, StoreUnreachable
from service.store.cards import ModelCard
from service.store.location import RemoteOptions, hide, objection, secrets_of, write_index
from tests.conftest import ROOT
from tests.service.remotes import S3, TINY, add_small, bytes_of, fetched, remote, site, weights


def test_a_copy_that_rotted_is_fetched_again(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(folder, "rotten"), tmp_path / "cache")
    copy = fetched(store).folder / "model.safetensors"
    copy.write_bytes(bytes(copy.stat().st_size))

    fetched(store)

    assert copy.read_bytes() == weights(folder).read_bytes()


def test_the_copies_stay_within_their_bytes_and_the_longest_unused_go_first(
    s3: S3, folder: Path, tmp_path: Path
) -> None:
    for tag in ("a", "b"):
        add_small(folder, f"pvt_v2_b0.{tag}")
    store = remote(s3.upload(folder, "bounded"), tmp_path / "cache", cache_bytes=250_000)  # two models of 100 kB

    for name in (TINY, "pvt_v2_b0.a", TINY, "pvt_v2_b0.b"):
        fetched(store, name)
        assert bytes_of(tmp_path / "cache") <= 250_000

    assert [path.parent.parent.name for path in sorted((tmp_path / "cache").rglob("*.safetensors"))] == [
        "pvt_v2_b0.b",
        TINY,
    ]


def test_what_is_being_loaded_is_not_evicted(s3: S3, folder: Path, tmp_path: Path) -> None:
    add_small(folder, "pvt_v2_b0.other")
    store = remote(s3.upload(folder, "held"), tmp_path / "cache", cache_bytes=150_000)

    with store.holding(store.find(TINY)) as stored, pytest.raises(StoreCacheFailed, match="PVT_STORE_CACHE_MB"):
        fetched(store, "pvt_v2_b0.other")

    assert weights(stored.folder.parent.parent).exists()
    assert fetched(store, "pvt_v2_b0.other").id == "pvt_v2_b0.other"
    assert not weights(stored.folder.parent.parent).exists()


def test_a_model_larger_than_the_cache_is_reported(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(folder, "large"), tmp_path / "cache", cache_bytes=50_000)

    with pytest.raises(StoreCacheFailed, match=r"has \d+ bytes, more than the 50000 of PVT_STORE_CACHE_MB"):
        fetched(store)


def test_a_cache_that_can_not_be_written_is_reported(s3: S3, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")

    with pytest.raises(StoreCacheFailed, match="PVT_STORE_CACHE_DIR"):
        remote(s3.upload(folder, "unwritten"), tmp_path / "cache").models()


def test_a_full_disk_is_reported_and_leaves_the_store_usable(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(folder, "full"), tmp_path / "cache")
    store.models()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # EFBIG where a full disk says ENOSPC
    try:
        with pytest.raises(StoreCacheFailed, match="File too large; PVT_STORE_CACHE_DIR"):
            fetched(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert fetched(store).id == TINY


def test_a_cache_that_somebody_emptied_is_filled_again(s3: S3, folder: Path, tmp_path: Path) -> None:
    (folder / "aliases.json").write_text(f'{{"prod": "{TINY}"}}')
    store = remote(s3.upload(folder, "emptied"), tmp_path / "cache")
    fetched(store)
    shutil.rmtree(tmp_path / "cache")

    assert fetched(store, "prod").failure is None
    assert store.aliases() == {"prod": TINY}

    weights(store.root).parent.joinpath("card.json").unlink()
    store.sync()
    assert [model.failure for model in store.models()] == [None]


def test_a_small_file_that_does_not_fit_leaves_nothing_and_is_reported(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(folder, "small"), tmp_path / "cache")
    store.models()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # less than a file's buffer
    try:
        s3.client.put_object(Bucket="small", Key=f"{TINY}/2/card.json", Body=b"x" * 6000)
        store.sync()
        models = store.versions(TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert list(tmp_path.rglob("*.part")) == []
    assert "PVT_STORE_CACHE_DIR" in str(models[0].failure)
    assert models[1].failure is None


def test_two_processes_fetch_a_model_once(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:
        code = f"""
from pathlib import Path
from service.store.remote import RemoteStore
from service.store.location import hide, secrets_of, write_index, RemoteOptions
store = RemoteStore(RemoteOptions(url={server.url!r}, cache=Path({str(tmp_path / "cache")!r}), cache_bytes=10**9))
stored = store.find({TINY!r})
print("ready", flush=True); input()
with store.holding(stored): print((stored.folder / "model.safetensors").stat().st_size)
"""
        command = [sys.executable, "-c", code]
        both = [
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in both:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        outputs = [process.communicate("\n", timeout=60)[0] for process in both]
        gets = [path for path in server.handler.requested if path.endswith("model.safetensors")]

    assert [output.split()[-1] for output in outputs] == ["100000"] * 2
    assert len(gets) == 1


def test_a_process_killed_while_it_fetches_leaves_no_lock(s3: S3, folder: Path, tmp_path: Path) -> None:
    url = s3.upload(folder, "killed")
    code = f"""
import os
from pathlib import Path
from service.store.remote import RemoteStore
from service.store.location import hide, secrets_of, write_index, RemoteOptions
store = RemoteStore(RemoteOptions(url={url!r}, cache=Path({str(tmp_path / "cache")!r}), cache_bytes=10**9))
os.fsync = lambda _: os.kill(os.getpid(), 9)
with store.holding(store.find({TINY!r})): pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == -9
    assert fetched(remote(url, tmp_path / "cache")).id == TINY


def test_names_that_would_leave_the_copy_are_ignored(folder: Path, tmp_path: Path) -> None:
    index = write_index(folder).model_dump()
    index["files"] += ({"path": f"../../{TINY}/1/card.json", "bytes": 1, "sha256": "0" * 64},)
    (folder / "index.json").write_text(json.dumps(index))
    with site(folder) as server:
        assert [model.id for model in remote(server.url, tmp_path / "cache").models()] == [TINY]

    assert {path.name for path in tmp_path.iterdir()} == {"source", "cache"}


def test_a_password_in_the_url_is_not_shown(tmp_path: Path) -> None:
    options = RemoteOptions(url="http://me:hush@127.0.0.1:1/store", cache=tmp_path, cache_bytes=1)

    with pytest.raises(StoreUnreachable) as caught:
        remote(options.url, tmp_path).models()

    assert "hush" not in f"{caught.value} {options.folder}"
    assert "http://127.0.0.1:1/store" in str(caught.value)


@pytest.mark.parametrize("failing", ["card.json", "model.safetensors"])
def test_a_password_in_the_url_is_not_shown_with_a_file_that_fails(folder: Path, tmp_path: Path, failing: str) -> None:
    with site(folder) as server:
        server.handler.status = lambda path: 500 if path.endswith(failing) else None
        with pytest.raises(ServiceError, match="500") as caught:
            fetched(remote(server.url.replace("//", "//me:hush@"), tmp_path / "cache"))

    assert "hush" not in str(caught.value)


QUERY = "token=hush-hush&signature=a%2Fb%2Bc%3D%3D"


@pytest.mark.parametrize("listed", ["index", "pages"])
def test_a_store_whose_url_has_a_query_is_read_with_it(folder: Path, tmp_path: Path, listed: str) -> None:
    if listed == "index":
        write_index(folder)
    with site(folder) as server:
        stored = fetched(remote(f"{server.url}/?{QUERY}", tmp_path / "cache"))

    assert stored.failure is None
    assert {unquote(path.partition("?")[2]) for path in server.handler.requested} == {unquote(QUERY)}
    assert "hush" not in str(next((tmp_path / "cache").iterdir()))


@pytest.mark.parametrize("failing", ["index.json", "card.json", "model.safetensors", "json"])
def test_a_secret_in_the_query_is_not_shown_whatever_fails(folder: Path, tmp_path: Path, failing: str) -> None:
    write_index(folder)
    with site(folder) as server:
        server.handler.status = lambda path: (
            500 if failing in {path.partition("?")[0][-len(failing) :], "everything"} else None
        )
        with pytest.raises(ServiceError) as caught:
            fetched(remote(f"{server.url}?{QUERY}", tmp_path / "cache"))

    shown = [word for word in ("hush", "signature", "b%2Bc", "b+c") if word in str(caught.value)]
    assert shown == []


def test_what_is_no_secret_is_not_hidden() -> None:
    assert secrets_of("s3://bucket/store") == secrets_of("https://host/a@b") == []
    assert hide("a store", secrets_of("https://a@host/?a&b=c")) == "a store"
    assert hide("url='https://me:hush@host/x?token=a%2Fb'", secrets_of("https://me:hush@host/?token=a/b")) == (
        "url='https://***host/x?***'"
    )


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    assert objection("s3://bucket") == "s3:// needs the package s3fs: pip install 'pvt-serve[s3]'"
    assert "none of s3://" in str(objection("ftp://host"))


def test_reference_images_are_fetched_too(s3: S3, model_store: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(model_store, "embedded"), tmp_path / "cache")
    stored = fetched(store, "pvt_v2_b0.digits")

    card: ModelCard = stored.require_card()
    assert card.reference
    assert (stored.folder / card.reference.file).exists()
