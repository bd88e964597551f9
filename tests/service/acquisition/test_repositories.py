"""Any repository of the hub into a store, from a server like the hub, and what may go wrong on the way."""

import json
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from service.acquisition.download import RetryPolicy
from service.acquisition.publishing import PULL_FOLDER, verify
from service.acquisition.pulling import Pulled, PullOptions
from service.acquisition.repositories import pull_repository, repository
from service.errors import InvalidRequest, PullFailed, WeightsCorrupt, WeightsMismatch, WeightsUnavailable
from service.store.store import Store
from tests.service.acquisition.saved import BIRDS, answers_of, in_timm, in_transformers, normalised
from tests.service.checkpoints import official
from tests.service.hub import Fault, Hub, serving_hub

NAME = "acme/pvt_v2_b0-birds"
QUICK = RetryPolicy(attempts=2, timeout_seconds=30, backoff_seconds=0.001)
SMALL = {"size": {"height": 64, "width": 64}}
IMAGES = np.random.default_rng(3).integers(0, 256, (2, 64, 64, 3), np.uint8)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub itself, by HF_ENDPOINT, for a user without a token."""
    with serving_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
        yield hub


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (root := tmp_path / "store").mkdir()
    return root


def pulled(root: Path, name: str = NAME, **options: Any) -> Pulled:
    source = PullOptions(policy=QUICK, mirror=options.pop("mirror", None))
    return pull_repository(root, repository(name), source, **options)


def nothing_in(root: Path) -> bool:
    """No model, and nothing half-made."""
    left = [path.name for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return Store(root).models() == [] and left == []


def test_shards_of_transformers_are_pulled_and_answer_as_transformers_does(
    hub: Hub, root: Path, tmp_path: Path
) -> None:
    theirs = in_transformers(tmp_path / "hub", shards=True, processor=SMALL)
    sha = hub.put_repository(NAME, tmp_path / "hub", licence="mit")
    shards = sorted((tmp_path / "hub").glob("model-*.safetensors"))
    notes: list[str] = []

    stored = pulled(root, on_note=notes.append).stored

    card = stored.require_card()
    assert (stored.key, card.labels, card.licence) == ("pvt_v2_b0.birds@1", BIRDS, "mit")
    assert (card.source, card.preprocessing.height) == (f"https://huggingface.co/{NAME}", 64)
    assert card.origin
    content = b"".join(path.read_bytes() for path in shards)
    assert (card.origin.sha256, card.origin.bytes) == (sha256(content).hexdigest(), len(content))
    assert (card.origin.digest_from, card.origin.revision) == ("hub", sha)
    with torch.inference_mode():
        wanted = theirs(normalised(stored, IMAGES)).logits.numpy()
    np.testing.assert_allclose(answers_of(stored, IMAGES), wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())
    assert any(note.startswith("proof: ") for note in notes)
    assert not [verdict for verdict in verify(root) if verdict.failure]
    assert {path.suffix for path in (root / PULL_FOLDER).iterdir()} == {".lock"}


@pytest.mark.parametrize("api", [True, False])
def test_a_folder_of_timm_is_pulled_from_the_hub_and_from_a_plain_mirror(
    hub: Hub, root: Path, tmp_path: Path, *, api: bool
) -> None:
    data = {"input_size": (3, 64, 64), "crop_pct": 0.8}
    in_timm(tmp_path / "hub", safe=False, model_config={"label_names": list(BIRDS)}, data_config=data)
    hub.put_repository(NAME, tmp_path / "hub", api=api)

    stored = pulled(root, mirror=None if api else hub.url).stored

    card = stored.require_card()
    assert (card.labels, card.preprocessing.crop, card.licence) == (BIRDS, 0.8, "apache-2.0")


def test_a_revision_is_what_it_names(hub: Hub, root: Path, tmp_path: Path) -> None:
    for revision, names in (("main", BIRDS), ("v1/old", ("a", "b", "c"))):
        in_transformers(tmp_path / revision, id2label=dict(enumerate(names)), processor=SMALL)
        hub.put_repository(NAME, tmp_path / revision, revision=revision.replace("/", "%2F"))

    assert pulled(root, f"{NAME}@v1/old").stored.require_card().labels == ("a", "b", "c")
    assert pulled(root).stored.require_card().labels == BIRDS


def test_what_is_there_at_that_commit_is_not_fetched_again(hub: Hub, root: Path, tmp_path: Path) -> None:
    in_transformers(tmp_path / "hub", processor=SMALL)
    hub.put_repository(NAME, tmp_path / "hub")
    first = pulled(root)
    fetched = len(hub.requests)
    second, other, third = pulled(root), pulled(root, tag="others"), pulled(root, again=True)

    assert [each.fresh for each in (first, second, other, third)] == [True, False, True, True]
    assert [each.stored.key for each in (first, second, other, third)] == [
        "pvt_v2_b0.birds@1", "pvt_v2_b0.birds@1", "pvt_v2_b0.others@1", "pvt_v2_b0.birds@2",
    ]  # fmt: skip
    assert len(hub.requests) == 3 * fetched + 1
    in_transformers(tmp_path / "hub", processor=SMALL, id2label={0: "x", 1: "y", 2: "z"})
    hub.put_repository(NAME, tmp_path / "hub")
    assert pulled(root).stored.key == "pvt_v2_b0.birds@3"


def test_a_pull_that_was_stopped_goes_on_where_it_ended(hub: Hub, root: Path, tmp_path: Path) -> None:
    in_transformers(tmp_path / "hub", processor=SMALL)
    hub.put_repository(NAME, tmp_path / "hub")
    stop = threading.Event()

    def on_progress(done: int, total: int | None) -> None:
        if total and total > 1_000_000 and done > 1_000_000:
            stop.set()

    with pytest.raises(PullFailed, match=r"stopped; .* MB are kept"):
        pulled(root, on_progress=on_progress, stop=stop)
    assert Store(root).models() == []
    assert pulled(root).fresh
    assert hub.requests[-1]["Range"].startswith("bytes=1")


def test_bits_that_flip_on_the_way_are_noticed(hub: Hub, root: Path, tmp_path: Path) -> None:
    in_transformers(tmp_path / "hub", processor=SMALL)
    hub.put_repository(NAME, tmp_path / "hub")
    hub.faults = [Fault()] * 3 + [Fault(spoil=True)]

    assert pulled(root).fresh
    assert len(hub.requests) == 5


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ("GatedRepo", "of an account that accepted the terms on its page of the hub"),
        ("RepoNotFound", "there is no such repository, or it is private .* check its name, then set HF_TOKEN"),
        ("", "it requires credentials; a hub's are HF_TOKEN"),
    ],
)
def test_a_private_repository_says_what_it_takes_and_the_token_gets_it(
    hub: Hub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, refusal: str, message: str
) -> None:
    in_transformers(tmp_path / "hub", processor=SMALL)
    hub.put_repository(NAME, tmp_path / "hub")
    hub.token, hub.refusal = "hf_secret", refusal

    with pytest.raises(PullFailed, match=message) as without:
        pulled(root)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(PullFailed, match="the token that is set does not suffice") as wrong:
        pulled(root)
    assert nothing_in(root)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert pulled(root).fresh
    assert "hf_" not in str(without.value) + str(wrong.value)


def test_a_repository_that_is_not_there_says_so(hub: Hub, root: Path) -> None:
    with pytest.raises(
        PullFailed, match=f"{NAME} at main: there is no such repository or revision, or it lacks model.saf"
    ):
        pulled(root)

    assert nothing_in(root)
    assert hub.requests == []


def test_a_hub_is_left_alone_where_the_user_is_offline(hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(PullFailed, match="HF_HUB_OFFLINE is set"):
        pulled(root)
    assert hub.requests == []


def test_a_model_that_can_not_be_served_is_refused_before_its_weights_are_fetched(
    hub: Hub, root: Path, tmp_path: Path
) -> None:
    in_transformers(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    hub.put_repository(NAME, tmp_path / "hub")

    with pytest.raises(
        WeightsMismatch, match=f"^{NAME}/config.json: it is of a .* model_type 'vit'; .*hf download {NAME}"
    ):
        pulled(root)
    assert len(hub.requests) == 2  # the list of files, and that one
    assert nothing_in(root)


def test_an_index_that_leads_out_of_its_repository_fetches_nothing(hub: Hub, root: Path, tmp_path: Path) -> None:
    in_transformers(tmp_path / "hub", shards=True)
    index = tmp_path / "hub" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["classifier.bias"] = "../../other/model.safetensors"
    index.write_text(json.dumps(content))
    hub.put_repository(NAME, tmp_path / "hub")

    with pytest.raises(WeightsCorrupt, match="which is no file beside it; refused"):
        pulled(root)
    assert len(hub.requests) == 3
    assert nothing_in(root)


def test_a_repository_without_weights_says_what_it_has(hub: Hub, root: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "notes.txt").write_text("soon")
    hub.put_repository(NAME, tmp_path / "hub")

    with pytest.raises(WeightsUnavailable, match=rf"{NAME} has no weights .*, but \.gitattributes, notes\.txt"):
        pulled(root)
    assert nothing_in(root)


def test_a_weights_file_with_another_name_is_found_in_the_list(hub: Hub, root: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "best.safetensors").write_bytes(safetensors.torch.save(dict(official(3))))
    hub.put_repository("acme/pvt_v2_b0", tmp_path / "hub")

    assert pulled(root, "acme/pvt_v2_b0", tag="mine").stored.key == "pvt_v2_b0.mine@1"


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("acme/pvt_v2_b2.in12k-ft", "in12k-ft"), ("acme/pvt_v2_b2_li.birds", "birds"),
        ("acme/birds.v2", "birds-v2"),
        ("acme/pvt_v2_b2", "pvt_v2_b2"),
    ],
)  # fmt: skip
def test_a_model_is_called_after_its_repository(name: str, tag: str) -> None:
    assert repository(name).tag == tag


@pytest.mark.parametrize(
    "name", ["acme/", "/birds", "acme/birds/more", "acme/../birds", "acme/..", "-a/b", "a/b@", "a/b@c@d", "a b/c"]
)
def test_what_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is no repository of the hub; write owner/name"):
        repository(name)
