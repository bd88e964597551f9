import asyncio
import fcntl
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import fsspec
import pytest

from service.cards import ModelCard, read_card
from service.errors import (
    CardInvalid,
    StoreCacheFailed,
    StoreNotWritable,
    StoreUnreachable,
    WeightsCorrupt,
    WeightsDigestMismatch,
    WeightsUnavailable,
)
from service.options import EngineOptions
from service.remote import RemoteStore
from service.store import StoredModel
from service.store_index import write_index
from service.store_urls import RemoteOptions, objection
from service.supply import Supply
from tests.conftest import ROOT
from tests.service.remotes import S3, Site, add_small, remote, site

TINY = "pvt_v2_b0.tiny"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    yield server
    server.server.stop()


@pytest.fixture(autouse=True)
def _environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store in a folder, with one model."""
    root = tmp_path / "source"
    add_small(root)
    return root


def weights(folder: Path, version: str = "1", id_: str = TINY) -> Path:
    return folder / id_ / version / "model.safetensors"


def weights_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def bytes_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.suffix != ".json")


def _options(server: Site, tmp_path: Path) -> RemoteOptions:
    return RemoteOptions(url=server.url, cache=tmp_path / "cache", cache_bytes=10**9)


def fetched(store: RemoteStore, name: str = TINY) -> StoredModel:
    with store.holding(store.find(name)) as stored:
        return stored


def test_a_model_in_s3_is_listed_by_its_card_alone_and_fetched_whole(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(folder, "whole", "some/prefix/"), tmp_path / "cache")

    listed = store.models()
    before = weights_files(tmp_path)
    stored = fetched(store)

    assert [(model.id, model.version, model.failure) for model in listed] == [(TINY, "1", None)]
    assert before == [weights(folder)]
    assert (stored.folder / "model.safetensors").read_bytes() == weights(folder).read_bytes()


@pytest.mark.parametrize("listing", [True, False])
def test_a_model_behind_http_is_found_by_listing_or_by_index(folder: Path, tmp_path: Path, listing: bool) -> None:
    if not listing:
        write_index(folder)
    with site(folder, listing=listing) as server:
        store = remote(server.url, tmp_path / "cache")

        assert [model.id for model in store.models()] == [TINY]
        assert (fetched(store).folder / "model.safetensors").read_bytes() == weights(folder).read_bytes()


def test_a_server_with_neither_listing_nor_index_is_told_how_to_make_one(folder: Path, tmp_path: Path) -> None:
    with site(folder, listing=False) as server:
        store = remote(server.url, tmp_path / "cache")

        with pytest.raises(StoreUnreachable, match="pvt-serve index"):
            store.models()


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_urls_of_fsspec_are_stores_too(folder: Path, tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://{folder}"
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(folder), str(folder), recursive=True)

    assert fetched(remote(url, tmp_path / "cache")).card == read_card(folder / TINY / "1")


def test_versions_and_aliases_are_those_of_the_store(s3: S3, folder: Path, tmp_path: Path) -> None:
    add_small(folder, version="2")
    (folder / "aliases.json").write_text(json.dumps({"production": f"{TINY}@1"}))
    store = remote(s3.upload(folder, "aliases"), tmp_path / "cache")

    assert [model.key for model in store.versions(TINY)] == [f"{TINY}@2", f"{TINY}@1"]
    assert store.find("production").key == f"{TINY}@1"
    with pytest.raises(StoreNotWritable, match=r"change its aliases.json there"):
        store.set_alias("production", TINY)


def test_what_is_added_changed_and_removed_is_noticed_at_the_next_look(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(folder, "changing"), tmp_path / "cache")
    fetched(store)
    add_small(folder, version="2", classes=5)
    card = read_card(add_small(folder, version="1", classes=4))
    for path in folder.rglob("*"):
        if path.is_file():
            s3.client.put_object(Bucket="changing", Key=str(path.relative_to(folder)), Body=path.read_bytes())

    store.sync()
    added = [model.version for model in store.versions(TINY)]
    changed = store.find(f"{TINY}@1").card
    fetched(store, f"{TINY}@1")
    for file in ("card.json", "model.safetensors"):
        s3.client.delete_object(Bucket="changing", Key=f"{TINY}/2/{file}")
    store.sync()

    assert added == ["2", "1"]
    assert changed == card
    assert [model.version for model in store.versions(TINY)] == ["1"]


def test_answers_between_two_looks_ask_the_store_nothing(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:
        store = remote(server.url, tmp_path / "cache")
        store.models()
        asked = len(server.handler.asked)

        for _ in range(20):
            store.models()

        assert len(server.handler.asked) == asked


def test_a_store_that_vanishes_leaves_its_listing_and_what_was_fetched(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:
        store = remote(server.url, tmp_path / "cache")
        fetched(store)
    store.sync()

    assert [model.failure for model in store.models()] == [None]
    assert "can't be read" in str(store.failure)
    assert fetched(store).id == TINY
    assert fetched(remote(server.url, tmp_path / "cache")).id == TINY  # a service that starts meanwhile


def test_a_store_that_hangs_delays_nobody_who_has_its_listing(folder: Path, tmp_path: Path) -> None:
    hanging, let_go = Event(), Event()

    def hang(_: str) -> None:
        hanging.set()
        let_go.wait(60)

    with site(folder) as server:
        store = remote(server.url, tmp_path / "cache", poll_seconds=0)
        store.models()
        server.handler.status = hang
        store.models()
        assert hanging.wait(30)

        listed = store.models()  # while the look at the store hangs
        let_go.set()

    assert [model.id for model in listed] == [TINY]


@pytest.mark.anyio
async def test_a_caller_who_leaves_while_files_are_fetched_holds_them_no_longer(folder: Path, tmp_path: Path) -> None:
    asked, let_go = Event(), Event()

    def hang(path: str) -> None:
        if path.endswith("safetensors"):
            asked.set()
            let_go.wait(60)

    with site(folder) as server:
        server.handler.status = hang
        store = remote(server.url, tmp_path / "cache")
        options = EngineOptions(model_store=store.root, default_model=TINY, remote_store=_options(server, tmp_path))
        supply = Supply(options)
        stored = await supply.find(TINY)

        async def load() -> None:
            async with supply.fetched(stored):
                pytest.fail("nobody waits for it any more")

        loading = asyncio.create_task(load())
        assert await asyncio.to_thread(asked.wait, 30)
        loading.cancel()
        await asyncio.wait([loading])
        let_go.set()
        async with supply.fetched(stored):  # when this one is there, the one before has ended
            pass
        await asyncio.sleep(0)
        supply.close()

    with store._cache._locked(store._cache._key(stored.folder), fcntl.LOCK_EX, wait=False):
        pass


def test_what_was_not_fetched_before_the_store_vanished_says_so(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:
        store = remote(server.url, tmp_path / "cache")
        store.models()

    with pytest.raises(StoreUnreachable, match=r"model.safetensors can't be read"):
        fetched(store)


def test_a_store_that_never_answered_is_said_to_be_away(tmp_path: Path) -> None:
    with site(tmp_path) as server:
        pass

    with pytest.raises(StoreUnreachable, match="PVT_MODEL_STORE names it"):
        remote(server.url, tmp_path / "cache").models()


def test_a_bucket_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreUnreachable, match=r"s3://nowhere.*it is not there"):
        remote("s3://nowhere", tmp_path / "cache").models()


def test_a_flipped_bit_on_the_way_is_refused_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    content = bytearray(weights(folder).read_bytes())
    content[5000] ^= 1
    weights(folder).write_bytes(content)
    with site(folder) as server, pytest.raises(WeightsDigestMismatch, match=f"{TINY}/1/model.safetensors: SHA-256"):
        fetched(remote(server.url, tmp_path / "cache"))

    assert bytes_of(tmp_path / "cache") == 0


def test_a_truncated_object_is_refused(s3: S3, folder: Path, tmp_path: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-100])

    with pytest.raises(WeightsCorrupt, match="truncated"):
        fetched(remote(s3.upload(folder, "truncated"), tmp_path / "cache"))


def test_weights_that_are_not_there_are_said_to_be_missing(s3: S3, folder: Path, tmp_path: Path) -> None:
    weights(folder).unlink()

    with pytest.raises(WeightsUnavailable, match="it is not there, though the card names it"):
        fetched(remote(s3.upload(folder, "missing"), tmp_path / "cache"))


def test_a_model_without_a_card_harms_no_other(s3: S3, folder: Path, tmp_path: Path) -> None:
    (add_small(folder, "pvt_v2_b0.bare") / "card.json").unlink()
    store = remote(s3.upload(folder, "bare"), tmp_path / "cache")

    failures = {model.id: model.failure for model in store.models()}

    assert failures[TINY] is None
    assert isinstance(failures["pvt_v2_b0.bare"], CardInvalid)
    assert str(failures["pvt_v2_b0.bare"]) == "s3://bare/pvt_v2_b0.bare/1/card.json: it is not there"


@pytest.mark.parametrize("status", [401, 403])
def test_a_card_that_may_not_be_read_is_said_and_harms_no_other(folder: Path, tmp_path: Path, status: int) -> None:
    add_small(folder, "pvt_v2_b0.secret")
    with site(folder) as server:
        server.handler.status = lambda path: status if "secret" in path and "card" in path else None
        failures = {model.id: model.failure for model in remote(server.url, tmp_path / "cache").models()}

    assert failures[TINY] is None
    assert "permission denied; credentials" in str(failures["pvt_v2_b0.secret"])


def test_weights_that_may_not_be_read_are_said(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:
        server.handler.status = lambda path: 403 if "model" in path.rpartition("/")[2] else None
        with pytest.raises(StoreUnreachable, match="permission denied"):
            fetched(remote(server.url, tmp_path / "cache"))


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_store_that_may_not_be_listed_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with site(folder) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.handler.status = lambda _: 403
        url = server.url if scheme == "http" else "s3://bucket"
        with pytest.raises(StoreUnreachable, match="permission denied"):
            remote(url, tmp_path / "cache").models()


def test_a_fetch_goes_on_from_where_an_earlier_one_ended(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(folder, "resumed"), tmp_path / "cache")
    stored = store.find(TINY)
    content, digest = weights(folder).read_bytes(), stored.require_card().weights.sha256
    part = stored.folder / f".{digest[:16]}.part"
    part.write_bytes(content[:-1000])
    s3.client.put_object(  # only its end is right: what came before can't have been read again
        Bucket="resumed", Key=f"{TINY}/1/model.safetensors", Body=bytes(len(content) - 1000) + content[-1000:]
    )

    fetched(store)

    assert weights(store.root).read_bytes() == content


def test_where_ranges_are_not_served_a_fetch_begins_anew(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:  # which knows no ranges
        store = remote(server.url, tmp_path / "cache")
        stored = store.find(TINY)
        (stored.folder / f".{stored.require_card().weights.sha256[:16]}.part").write_bytes(b"something else")

        fetched(store)

    assert weights(store.root).read_bytes() == weights(folder).read_bytes()


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

    assert [path.parent.parent.name for path in weights_files(tmp_path / "cache")] == ["pvt_v2_b0.b", TINY]


def test_what_is_being_loaded_is_not_evicted(s3: S3, folder: Path, tmp_path: Path) -> None:
    add_small(folder, "pvt_v2_b0.other")
    store = remote(s3.upload(folder, "held"), tmp_path / "cache", cache_bytes=150_000)

    with store.holding(store.find(TINY)) as stored, pytest.raises(StoreCacheFailed, match="PVT_STORE_CACHE_MB"):
        fetched(store, "pvt_v2_b0.other")

    assert weights(stored.folder.parent.parent).exists()
    assert fetched(store, "pvt_v2_b0.other").id == "pvt_v2_b0.other"
    assert not weights(stored.folder.parent.parent).exists()


def test_a_model_larger_than_the_cache_is_told_so(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(folder, "large"), tmp_path / "cache", cache_bytes=50_000)

    with pytest.raises(StoreCacheFailed, match=r"has \d+ bytes, more than the 50000 of PVT_STORE_CACHE_MB"):
        fetched(store)


def test_a_cache_that_can_not_be_written_is_said(s3: S3, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")

    with pytest.raises(StoreCacheFailed, match="PVT_STORE_CACHE_DIR"):
        remote(s3.upload(folder, "unwritten"), tmp_path / "cache").models()


def test_a_full_disk_is_said_and_leaves_the_store_usable(s3: S3, folder: Path, tmp_path: Path) -> None:
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


def test_two_processes_fetch_a_model_once(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:
        code = f"""
from pathlib import Path
from service.remote import RemoteStore
from service.store_urls import RemoteOptions
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
        gets = [path for path in server.handler.asked if path.endswith("model.safetensors")]

    assert [output.split()[-1] for output in outputs] == ["100000"] * 2
    assert len(gets) == 1


def test_a_process_killed_while_it_fetches_leaves_no_lock(s3: S3, folder: Path, tmp_path: Path) -> None:
    url = s3.upload(folder, "killed")
    code = f"""
import os
from pathlib import Path
from service import byte_cache
from service.remote import RemoteStore
from service.store_urls import RemoteOptions
store = RemoteStore(RemoteOptions(url={url!r}, cache=Path({str(tmp_path / "cache")!r}), cache_bytes=10**9))
byte_cache._written = lambda to, piece: (to.write(piece), to.flush(), os.kill(os.getpid(), 9))
with store.holding(store.find({TINY!r})): pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == -9
    assert fetched(remote(url, tmp_path / "cache")).id == TINY


def test_names_that_would_leave_the_copy_are_not_there(folder: Path, tmp_path: Path) -> None:
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


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    assert objection("s3://bucket") == "s3:// needs the package s3fs: pip install 'pvt-serve[s3]'"
    assert "none of s3://" in str(objection("ftp://host"))


def test_reference_pictures_come_along(s3: S3, model_store: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(model_store, "embedded"), tmp_path / "cache")
    stored = fetched(store, "pvt_v2_b0.digits")

    card: ModelCard = stored.require_card()
    assert card.reference
    assert (stored.folder / card.reference.file).exists()
