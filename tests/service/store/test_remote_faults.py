import asyncio
import json
import os
from pathlib import Path
from threading import Event

import pytest

from service.errors import (
    CardInvalid,
    ServiceError,
    StoreUnreachable,
    WeightsCorrupt,
    WeightsDigestMismatch,
    WeightsUnavailable,
)
from service.files import locked
from service.options import EngineOptions
from service.registry.catalog import Catalog
from service.store.location import RemoteOptions, write_index
from service.store.remote import lock_of
from tests.service.remotes import S3, TINY, Site, add_small, bytes_of, fetched, remote, site, weights


def _options(server: Site, tmp_path: Path) -> RemoteOptions:
    return RemoteOptions(url=server.url, cache=tmp_path / "cache", cache_bytes=10**9)


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
    hanging, released = Event(), Event()

    def hang(_: str) -> None:
        hanging.set()
        released.wait(60)

    with site(folder) as server:
        store = remote(server.url, tmp_path / "cache", poll_seconds=0)
        store.models()
        server.handler.status = hang
        store.models()
        assert hanging.wait(30)

        listed = store.models()  # while the look at the store hangs
        released.set()

    assert [model.id for model in listed] == [TINY]


def test_a_service_that_starts_while_the_store_hangs_answers_from_its_copy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.store.remote.FIRST_SECONDS", 0.1)
    released = Event()
    with site(folder) as server:
        remote(server.url, tmp_path / "cache").models()
        server.handler.status = lambda _: released.wait(60) and None

        store = remote(server.url, tmp_path / "cache")
        listed = [store.models(), store.models()]
        assert not released.is_set()
        released.set()

    assert [[model.id for model in models] for models in listed] == [[TINY], [TINY]]


@pytest.mark.anyio
async def test_a_caller_who_leaves_while_files_are_fetched_holds_them_no_longer(folder: Path, tmp_path: Path) -> None:
    requested, released = Event(), Event()

    def hang(path: str) -> None:
        if path.endswith("safetensors"):
            requested.set()
            released.wait(60)

    with site(folder) as server:
        server.handler.status = hang
        store = remote(server.url, tmp_path / "cache")
        options = EngineOptions(model_store=store.root, default_model=TINY, remote_store=_options(server, tmp_path))
        catalog = Catalog(options)
        (found,) = await catalog.find(TINY)
        stored = found.stored

        async def load() -> None:
            async with catalog.fetched(stored):
                pytest.fail("nobody waits for it any more")

        loading = asyncio.create_task(load())
        assert await asyncio.to_thread(requested.wait, 30)
        loading.cancel()
        await asyncio.wait([loading])
        released.set()
        async with catalog.fetched(stored):  # when this one is there, the one before has ended
            pass
        await asyncio.sleep(0)
        catalog.close()

    with locked(lock_of(stored.folder), wait=False):
        pass


def test_what_was_not_fetched_before_the_store_vanished_says_so(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:
        store = remote(server.url, tmp_path / "cache")
        store.models()

    with pytest.raises(StoreUnreachable, match=r"model.safetensors can't be read"):
        fetched(store)


def test_a_store_that_never_answered_is_reported_as_unreachable(tmp_path: Path) -> None:
    with site(tmp_path) as server:
        pass

    with pytest.raises(StoreUnreachable, match="PVT_MODEL_STORE names it"):
        remote(server.url, tmp_path / "cache").models()


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_reported(tmp_path: Path) -> None:
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


def test_missing_weights_are_reported(s3: S3, folder: Path, tmp_path: Path) -> None:
    weights(folder).unlink()

    with pytest.raises(WeightsUnavailable, match="it is not there, though the card names it"):
        fetched(remote(s3.upload(folder, "missing"), tmp_path / "cache"))
    with site(folder) as server, pytest.raises(WeightsUnavailable, match="it is not there, though the card names it"):
        fetched(remote(server.url, tmp_path / "other"))


def test_a_model_without_a_card_harms_no_other(s3: S3, folder: Path, tmp_path: Path) -> None:
    (add_small(folder, "pvt_v2_b0.bare") / "card.json").unlink()
    store = remote(s3.upload(folder, "bare"), tmp_path / "cache")

    failures = {model.id: model.failure for model in store.models()}

    assert failures[TINY] is None
    assert isinstance(failures["pvt_v2_b0.bare"], CardInvalid)
    assert str(failures["pvt_v2_b0.bare"]) == "s3://bare/pvt_v2_b0.bare/1/card.json: it is not there"


@pytest.mark.parametrize("status", [401, 403])
def test_a_card_that_may_not_be_read_is_reported_and_harms_no_other(folder: Path, tmp_path: Path, status: int) -> None:
    add_small(folder, "pvt_v2_b0.secret")
    with site(folder) as server:
        server.handler.status = lambda path: status if "secret" in path and "card" in path else None
        failures = {model.id: model.failure for model in remote(server.url, tmp_path / "cache").models()}

    assert failures[TINY] is None
    assert "permission denied; credentials" in str(failures["pvt_v2_b0.secret"])


@pytest.mark.parametrize("status", [401, 403])
def test_a_model_that_may_not_be_listed_is_reported_and_harms_none(folder: Path, tmp_path: Path, status: int) -> None:
    add_small(folder, "pvt_v2_b0.secret")
    with site(folder) as server:
        server.handler.status = lambda path: status if "secret" in path else None
        store = remote(server.url, tmp_path / "cache")
        failures = {model.id: model.failure for model in store.models()}
        server.handler.status = lambda _: None
        store.sync()

    assert failures[TINY] is None
    assert f"{server.url}/pvt_v2_b0.secret/card.json: permission denied" in str(failures["pvt_v2_b0.secret"])
    assert [model.failure for model in store.models()] == [None, None]


def test_a_card_that_fails_again_and_again_does_not_make_the_store_unreachable(folder: Path, tmp_path: Path) -> None:
    add_small(folder, "pvt_v2_b0.other")
    write_index(folder)
    with site(folder) as server:
        server.handler.status = lambda path: 500 if "other" in path and "card" in path else None
        store = remote(server.url, tmp_path / "cache")
        store.models()
        store.sync()  # which reads nothing but the card that failed

    assert store.failure is None
    assert [model.failure is None for model in store.models()] == [False, True]


def test_a_link_to_nowhere_in_place_of_a_model_harms_no_other(folder: Path, tmp_path: Path) -> None:
    (folder / "pvt_v2_b0.other").symlink_to("nowhere")
    (folder / "pvt_v2_b0.round").symlink_to("pvt_v2_b0.round")

    models = remote(f"file://{folder}", tmp_path / "cache").models()

    assert [model.id for model in models if model.failure is None] == [TINY]


def test_an_index_of_a_newer_release_is_read(folder: Path, tmp_path: Path) -> None:
    write_index(folder)
    content = json.loads((folder / "index.json").read_text())
    content["made_by"] = "a newer release"
    for file in content["files"]:
        file["modified"] = 7
    (folder / "index.json").write_text(json.dumps(content))
    with site(folder, listing=False) as server:
        assert fetched(remote(server.url, tmp_path / "cache")).id == TINY


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path, tmp_path: Path, *, linked: bool) -> None:
    card = add_small(folder, "pvt_v2_b0.other") / "card.json"
    for path in (card, folder / "aliases.json", weights(folder)):
        path.unlink(missing_ok=True)
        os.mkfifo(pipe := path.with_suffix(".pipe") if linked else path)
        if linked:
            path.symlink_to(pipe)
    store = remote(f"file://{folder}", tmp_path / "cache")

    failures = {model.id: model.failure for model in store.models()}

    assert failures[TINY] is None
    assert f"{card}: OSError: no regular file" in str(failures["pvt_v2_b0.other"])
    with pytest.raises(ServiceError, match="no regular file"):
        fetched(store)


def test_weights_that_may_not_be_read_are_reported(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:
        server.handler.status = lambda path: 403 if "model" in path.rpartition("/")[2] else None
        with pytest.raises(StoreUnreachable, match="permission denied"):
            fetched(remote(server.url, tmp_path / "cache"))


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_store_that_may_not_be_listed_is_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with site(folder) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.handler.status = lambda _: 403
        url = server.url if scheme == "http" else "s3://bucket"
        with pytest.raises(StoreUnreachable, match="permission denied"):
            remote(url, tmp_path / "cache").models()
