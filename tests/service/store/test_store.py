import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.errors import CardInvalid, ModelNotFound, WeightsCorrupt, WeightsUnavailable
from service.store.folder import write_model
from service.store.store import Store
from tests.service.stores import add_model


@pytest.fixture
def store(tmp_path: Path) -> Store:
    add_model(tmp_path, "pvt_v2_b0.tiny")
    return Store(tmp_path)


def edit_card(folder: Path, **fields: Any) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_model_is_read_with_its_card(store: Store) -> None:
    (model,) = store.models()

    assert (model.id, model.variant, model.version) == ("pvt_v2_b0.tiny", "pvt_v2_b0", "1")
    assert model.require_card().labels == ("label 0", "label 1", "label 2")


def test_the_newest_version_counts_by_number(store: Store) -> None:
    for version in ("2", "10"):
        add_model(store.root, version=version)

    assert store.find("pvt_v2_b0.tiny").version == "10"


def test_what_was_added_is_found_without_a_restart(store: Store) -> None:
    add_model(store.root, "pvt_v2_b1.new")

    assert [model.id for model in store.models()] == ["pvt_v2_b0.tiny", "pvt_v2_b1.new"]


def test_a_variant_alone_means_its_only_model(store: Store) -> None:
    assert store.find("pvt_v2_b0").id == "pvt_v2_b0.tiny"


def test_a_variant_alone_means_its_imagenet_weights_first(store: Store) -> None:
    add_model(store.root, "pvt_v2_b0.in1k")

    assert store.find("pvt_v2_b0").id == "pvt_v2_b0.in1k"


def test_a_variant_alone_that_could_mean_several_is_refused(store: Store) -> None:
    add_model(store.root, "pvt_v2_b0.other")

    with pytest.raises(ModelNotFound, match=r"'pvt_v2_b0' alone could mean 'pvt_v2_b0.other', 'pvt_v2_b0.tiny'"):
        store.find("pvt_v2_b0")


@pytest.mark.parametrize("name", ["pvt_v2_b5", "pvt_v2_b5.in1k"])
def test_published_weights_that_are_not_here_are_unavailable(store: Store, name: str) -> None:
    with pytest.raises(
        WeightsUnavailable, match=r"'pvt_v2_b5.in1k' are not in the store; fetch them with 'pvt-serve pull pvt_v2_b5'"
    ):
        store.find(name)


def test_an_unknown_name_is_not_found_and_the_nearest_one_named(store: Store) -> None:
    with pytest.raises(ModelNotFound, match=r"no model 'pvt_v2_b0.tni'.*did you mean 'pvt_v2_b0.tiny'"):
        store.find("pvt_v2_b0.tni")


@pytest.mark.parametrize("name", ["../secret", "pvt_v2_b0.tiny/1", "", ".", "pvt_v2_b0."])
def test_a_name_is_never_a_path(store: Store, name: str) -> None:
    with pytest.raises(ModelNotFound):
        store.find(name)


def test_a_missing_store_says_which_setting_names_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match="PVT_MODEL_STORE"):
        Store(tmp_path / "nowhere").models()


def test_other_folders_and_files_are_no_models(store: Store) -> None:
    for name in (".partial", "lost+found", "private", os.fsdecode(b"pvt_v2_b0.\xff")):
        (store.root / name).mkdir()
    (store.root / "README.md").write_text("hello")

    assert [model.id for model in store.models()] == ["pvt_v2_b0.tiny"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"id": "pvt_v2_b0.other"}, "the card is for 'pvt_v2_b0.other' and lies in the folder of 'pvt_v2_b0.tiny'"),
        ({"variant": "pvt_v2_b1"}, "named <variant>.<tag> with the card's variant 'pvt_v2_b1'"),
        ({"labels": [1]}, "labels.0: Input should be a valid string"),
        ({"parameters": -1}, "parameters: Input should be greater than 0"),
        ({"preprocessing": {"height": 16, "width": 32}}, "preprocessing.height: Input should be greater than or equal"),
        ({"weights": {"file": "../x.pth", "sha256": "0" * 64, "bytes": 1}}, "weights.file: String should match"),
    ],
)
def test_a_broken_card_fails_its_model_with_the_reason_and_no_other(
    store: Store, fields: dict[str, Any], reason: str
) -> None:
    edit_card(store.root / "pvt_v2_b0.tiny" / "1", **fields)
    add_model(store.root, "pvt_v2_b1.fine")

    broken, fine = store.models()

    assert isinstance(broken.failure, CardInvalid)
    assert reason in str(broken.failure)
    assert fine.failure is None
    with pytest.raises(CardInvalid):
        broken.require_card()


def test_a_card_that_is_no_json_fails_its_model(store: Store) -> None:
    (store.root / "pvt_v2_b0.tiny" / "1" / "card.json").write_text("{")

    assert "Invalid JSON" in str(store.models()[0].failure)


def test_a_variant_without_a_tag_is_a_mistake_and_reported(store: Store) -> None:
    (store.root / "pvt_v2_b0").mkdir()

    assert "no version folder" in str(store.models()[0].failure)


def test_a_folder_that_can_not_be_read_fails_its_model_and_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(store.root, "pvt_v2_b1.closed")
    listed = Path.iterdir

    def refusing(path: Path) -> Iterator[Path]:
        if path.name == "pvt_v2_b1.closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refusing)

    fine, closed = store.models()

    assert fine.failure is None
    assert "Permission denied" in str(closed.failure)


@pytest.mark.parametrize("name", ["card.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(store: Store, name: str) -> None:
    path = store.root / "pvt_v2_b0.tiny" / "1" / name
    path.unlink()
    os.mkfifo(path)

    assert "no regular file" in str(store.models()[0].failure)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_a_card_with_a_number_that_is_none_fails(store: Store, value: str) -> None:
    path = store.root / "pvt_v2_b0.tiny" / "1" / "card.json"
    path.write_text(path.read_text().replace("0.485", value))

    assert isinstance(store.models()[0].failure, CardInvalid)


def test_a_missing_card_fails_its_model(store: Store) -> None:
    (store.root / "pvt_v2_b0.tiny" / "1" / "card.json").unlink()

    assert "No such file" in str(store.models()[0].failure)


def test_a_model_without_a_version_fails(store: Store) -> None:
    shutil.rmtree(store.root / "pvt_v2_b0.tiny" / "1")

    assert "no version folder" in str(store.models()[0].failure)


def test_weights_of_another_length_fail_before_they_are_read(store: Store) -> None:
    with (store.root / "pvt_v2_b0.tiny" / "1" / "model.safetensors").open("ab") as file:
        file.write(b"x")

    failure = store.models()[0].failure
    assert isinstance(failure, WeightsCorrupt)
    assert "the card says" in str(failure)


def test_missing_weights_fail_their_model(store: Store) -> None:
    (store.root / "pvt_v2_b0.tiny" / "1" / "model.safetensors").unlink()

    assert isinstance(store.models()[0].failure, WeightsCorrupt)


def test_writing_a_version_again_replaces_it_whole(store: Store) -> None:
    folder = add_model(store.root, classes=5)

    assert sorted(path.name for path in folder.parent.iterdir()) == ["1"]
    assert len(store.find("pvt_v2_b0.tiny").require_card().labels) == 5


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(100)


def test_a_broken_newest_version_is_passed_over_and_stays_visible(store: Store) -> None:
    truncate(add_model(store.root, version="2"))

    assert [model.key for model in store.models()] == ["pvt_v2_b0.tiny@1"]
    assert store.find("pvt_v2_b0.tiny").version == "1"
    newest, oldest = store.versions("pvt_v2_b0.tiny")
    assert (newest.version, oldest.version) == ("2", "1")
    assert isinstance(newest.failure, WeightsCorrupt)
    assert oldest.failure is None


def test_where_every_version_is_broken_the_newest_reports_why(store: Store) -> None:
    truncate(add_model(store.root, version="2"))
    (store.root / "pvt_v2_b0.tiny" / "1" / "card.json").unlink()

    (model,) = store.models()

    assert model.version == "2"
    assert isinstance(model.failure, WeightsCorrupt)
    assert [each.key for each in store.candidates("pvt_v2_b0.tiny")] == ["pvt_v2_b0.tiny@2"]


def test_a_version_is_named_after_an_at_sign(store: Store) -> None:
    add_model(store.root, version="2")

    assert store.find("pvt_v2_b0.tiny@1").version == "1"
    assert store.find("pvt_v2_b0@1").key == "pvt_v2_b0.tiny@1"


def test_a_named_version_that_is_broken_says_so_and_no_other_stands_in(store: Store) -> None:
    truncate(add_model(store.root, version="2"))

    (model,) = store.candidates("pvt_v2_b0.tiny@2")

    assert isinstance(model.failure, WeightsCorrupt)


def test_a_version_that_is_missing_is_not_found_and_the_others_are_named(store: Store) -> None:
    with pytest.raises(ModelNotFound, match=r"'pvt_v2_b0.tiny' has no version '7'; there are: 1"):
        store.find("pvt_v2_b0.tiny@7")


@pytest.mark.parametrize("version", ["", "0", "01", "latest", "1/..", "-1", "1@1", "٣", "9" * 5000])
def test_what_is_no_version_is_not_found(store: Store, version: str) -> None:
    with pytest.raises(ModelNotFound, match="must be a version's number"):
        store.find(f"pvt_v2_b0.tiny@{version}")


def test_candidates_are_the_good_versions_newest_first(store: Store) -> None:
    for version in ("2", "3", "10"):
        add_model(store.root, version=version)
    truncate(store.root / "pvt_v2_b0.tiny" / "3")

    assert [model.version for model in store.candidates("pvt_v2_b0.tiny")] == ["10", "2", "1"]


def test_folders_that_are_no_versions_are_passed_over(store: Store) -> None:
    for name in ("0", "01", "latest", ".partial", "٣"):
        (store.root / "pvt_v2_b0.tiny" / name).mkdir()

    assert [model.version for model in store.versions("pvt_v2_b0.tiny")] == ["1"]


def test_a_partial_store_misses_no_weights_but_refuses_those_of_another_length(store: Store) -> None:
    add_model(store.root, version="2")
    (store.root / "pvt_v2_b0.tiny" / "1" / "model.safetensors").unlink()
    truncate(store.root / "pvt_v2_b0.tiny" / "2")

    newest, oldest = Store(store.root, partial=True).versions("pvt_v2_b0.tiny")

    assert isinstance(newest.failure, WeightsCorrupt)
    assert oldest.failure is None


def test_a_model_is_written_as_the_next_free_version(store: Store) -> None:
    card = store.find("pvt_v2_b0.tiny").require_card()
    weights = (store.root / "pvt_v2_b0.tiny" / "1" / "model.safetensors").read_bytes()
    (store.root / "pvt_v2_b0.tiny" / "4").mkdir()

    folder = write_model(store.root, None, card, weights)

    assert folder.name == "5"
    assert store.find("pvt_v2_b0.tiny").key == "pvt_v2_b0.tiny@5"


def test_a_version_that_is_replaced_leaves_nothing_else(store: Store) -> None:
    card = store.find("pvt_v2_b0.tiny").require_card()
    weights = (store.root / "pvt_v2_b0.tiny" / "1" / "model.safetensors").read_bytes()

    write_model(store.root, "1", card.model_copy(update={"source": "anew"}), weights)

    assert store.find("pvt_v2_b0.tiny").require_card().source == "anew"
    assert [path.name for path in (store.root / "pvt_v2_b0.tiny").iterdir()] == ["1"]
    assert [path.name for path in store.root.iterdir() if path.name.startswith(".")] == []


def test_a_version_that_cannot_be_replaced_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    card = store.find("pvt_v2_b0.tiny").require_card()
    version = store.root / "pvt_v2_b0.tiny" / "1"
    weights = (version / "model.safetensors").read_bytes()
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "staged":
            raise OSError(errno.EIO, "the disk fails")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk fails"):
        write_model(store.root, "1", card, weights)

    assert (version / "model.safetensors").read_bytes() == weights
    assert store.find("pvt_v2_b0.tiny").require_card() == card


def test_two_who_write_at_the_same_time_get_a_version_each(store: Store) -> None:
    card = store.find("pvt_v2_b0.tiny").require_card()
    weights = (store.root / "pvt_v2_b0.tiny" / "1" / "model.safetensors").read_bytes()

    with ThreadPoolExecutor(4) as threads:
        written = [threads.submit(write_model, store.root, None, card, weights) for _ in range(6)]

    assert sorted(int(each.result().name) for each in written) == list(range(2, 8))
