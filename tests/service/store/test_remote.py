import json
from pathlib import Path

import fsspec
import pytest

from service.errors import (
    StoreNotWritable,
    StoreUnreachable,
)
from service.store.cards import read_card
from service.store.location import write_index
from tests.service.remotes import S3, TINY, add_small, fetched, remote, site, weights


def test_a_model_in_s3_is_listed_by_its_card_alone_and_fetched_whole(s3: S3, folder: Path, tmp_path: Path) -> None:
    store = remote(s3.upload(folder, "whole", "some/prefix/"), tmp_path / "cache")

    listed = store.models()
    before = sorted(tmp_path.rglob("*.safetensors"))
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


def test_a_server_with_neither_listing_nor_index_reports_how_to_make_one(folder: Path, tmp_path: Path) -> None:
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
        requested = len(server.handler.requested)

        for _ in range(20):
            store.models()

        assert len(server.handler.requested) == requested


def test_a_fetch_resumes_where_an_earlier_one_ended(s3: S3, folder: Path, tmp_path: Path) -> None:
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


def test_where_ranges_are_not_served_a_fetch_begins_again(folder: Path, tmp_path: Path) -> None:
    with site(folder) as server:  # which knows no ranges
        store = remote(server.url, tmp_path / "cache")
        stored = store.find(TINY)
        (stored.folder / f".{stored.require_card().weights.sha256[:16]}.part").write_bytes(b"something else")

        fetched(store)

    assert weights(store.root).read_bytes() == weights(folder).read_bytes()
