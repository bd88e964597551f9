"""Models in folders, as transformers and timm write them, in one file or in shards."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from service.acquisition.folders import is_folder, read_folder, read_shards, weights_among
from service.acquisition.importing import ImportOptions, import_model
from service.acquisition.preprocessing import PreprocessingOptions
from service.errors import (
    InvalidRequest,
    ServiceError,
    WeightsCorrupt,
    WeightsMismatch,
    WeightsUnavailable,
    WeightsUnsafe,
)
from service.store.store import Store, StoredModel
from tests.service.acquisition.saved import BIRDS, answers_of, in_timm, in_transformers, normalised
from tests.service.checkpoints import official, pickled

INDEX = "model.safetensors.index.json"
SMALL = PreprocessingOptions(height=64, width=64)
IMAGES = np.random.default_rng(3).integers(0, 256, (2, 64, 64, 3), np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (root := tmp_path / "store").mkdir()
    return root


def imported(root: Path, path: Path, **options: Any) -> tuple[StoredModel, str]:
    notes: list[str] = []
    stored = import_model(
        root, ImportOptions(file=path, tag="birds", **{"preprocessing": SMALL, **options}), notes.append
    )
    assert (root / stored.id / stored.version).is_dir()
    return stored, "\n".join(notes)


@pytest.mark.parametrize("variant", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_shards_of_transformers_become_the_model_that_transformers_has(
    root: Path, tmp_path: Path, variant: str
) -> None:
    theirs = in_transformers(tmp_path / "hub", shards=True, variant=variant)
    count = len(list((tmp_path / "hub").glob("model-*-of-*.safetensors")))
    stored, notes = imported(root, tmp_path / "hub")

    assert count > 1
    assert (stored.variant, stored.require_card().labels) == (variant, BIRDS)
    with torch.inference_mode():
        wanted = theirs(normalised(stored, IMAGES)).logits.numpy()
    np.testing.assert_allclose(answers_of(stored, IMAGES), wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())
    assert f"found {INDEX} with {count} shards with the config.json of transformers: {variant}" in notes
    assert "head: 3 classes, wren, robin, kite (from config.json)" in notes
    assert "proof: on 8 images" in notes


def test_the_index_of_shards_stands_for_its_folder(root: Path, tmp_path: Path) -> None:
    in_transformers(tmp_path / "hub", shards=True)

    assert imported(root, tmp_path / "hub" / INDEX)[0].require_card().labels == BIRDS


def test_shards_that_torch_saved_are_read_too(root: Path, tmp_path: Path) -> None:
    theirs = in_transformers(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").unlink()
    state = theirs.state_dict()
    halves = list(state)[::2], list(state)[1::2]
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for file, names in zip(files, halves, strict=True):
        torch.save({name: state[name] for name in names}, tmp_path / "hub" / file)
    index = {"weight_map": {name: file for file, names in zip(files, halves, strict=True) for name in names}}
    (tmp_path / "hub" / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    assert "pytorch_model.bin.index.json with 2 shards" in imported(root, tmp_path / "hub")[1]


@pytest.mark.parametrize(("variant", "safe"), [("pvt_v2_b0", False), ("pvt_v2_b2_li", True)])
def test_a_folder_of_timm_becomes_the_model_that_timm_has(
    root: Path, tmp_path: Path, variant: str, *, safe: bool
) -> None:
    theirs = in_timm(tmp_path / "hub", variant, safe=safe, model_config={"label_names": list(BIRDS)})
    stored, notes = imported(root, tmp_path / "hub")
    card = stored.require_card()

    assert (stored.variant, card.labels, card.licence) == (variant, BIRDS, "apache-2.0")
    with torch.inference_mode():
        wanted = theirs(normalised(stored, IMAGES)).numpy()
    np.testing.assert_allclose(answers_of(stored, IMAGES), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert f"with the config.json of timm: {variant}" in notes


def test_images_are_prepared_as_the_folder_of_timm_says(root: Path, tmp_path: Path) -> None:
    data = {
        "input_size": (3, 96, 96),
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4,) * 3,
    }
    in_timm(tmp_path / "hub", data_config=data)

    pixels = imported(root, tmp_path / "hub", preprocessing=PreprocessingOptions())[0].require_card().preprocessing

    assert (pixels.height, pixels.width, pixels.crop, pixels.interpolation) == (96, 96, 0.8, "bilinear")
    assert (pixels.resize, pixels.mean, pixels.std) == ("shorter_side_crop", (0.1, 0.2, 0.3), (0.4,) * 3)


def test_squash_without_a_crop_is_a_stretch(root: Path, tmp_path: Path) -> None:
    in_timm(tmp_path / "hub", data_config={"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "squash"})

    stored, _ = imported(root, tmp_path / "hub", preprocessing=PreprocessingOptions())

    assert stored.require_card().preprocessing.resize == "stretch"


def test_images_are_prepared_as_the_processor_of_transformers_says(root: Path, tmp_path: Path) -> None:
    processor = {"size": {"height": 96, "width": 64}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    in_transformers(tmp_path / "hub", processor=processor)

    stored, notes = imported(root, tmp_path / "hub", preprocessing=PreprocessingOptions())
    pixels = stored.require_card().preprocessing

    assert (pixels.height, pixels.width, pixels.resize, pixels.interpolation) == (96, 64, "stretch", "bilinear")
    assert (pixels.mean, pixels.std) == ((0.5,) * 3, (0.25,) * 3)
    assert "(preprocessor_config.json)" in notes


def test_without_a_processor_the_size_is_the_one_that_the_config_says(root: Path, tmp_path: Path) -> None:
    in_transformers(tmp_path / "hub", image_size=[64, 96])

    pixels = imported(root, tmp_path / "hub", preprocessing=PreprocessingOptions())[0].require_card().preprocessing

    assert (pixels.height, pixels.width, pixels.resize) == (64, 96, "stretch")


def test_several_labels_at_once_are_said(root: Path, tmp_path: Path) -> None:
    in_transformers(tmp_path / "hub", problem_type="multi_label_classification")

    assert "problem_type of config.json: multi_label_classification" in imported(root, tmp_path / "hub")[1]


def test_licence_and_source_are_those_of_the_folder_unless_given(root: Path, tmp_path: Path) -> None:
    in_transformers(tmp_path / "hub")
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: cc-by-4.0\ntags: [birds]\n---\n# Birds\n")

    card = imported(root, tmp_path / "hub")[0].require_card()
    given = imported(root, tmp_path / "hub", licence="MIT", source="our lab")[0].require_card()

    assert (card.licence, card.source) == ("cc-by-4.0", "hub")
    assert (given.licence, given.source) == ("MIT", "our lab")


@pytest.mark.parametrize("page", ["no head", "---\n: [\n---\n", "---\nlicense: [a, b]\n---\n", "---\n- 1\n---\n"])
def test_a_page_without_a_licence_that_can_be_read_says_none(root: Path, tmp_path: Path, page: str) -> None:
    in_transformers(tmp_path / "hub")
    (tmp_path / "hub" / "README.md").write_text(page)

    assert imported(root, tmp_path / "hub")[0].require_card().licence == "unknown"


def test_the_labels_that_are_given_win(root: Path, tmp_path: Path) -> None:
    in_transformers(tmp_path / "hub", id2label={0: "a", 1: "b"}, num_labels=2)
    (names := tmp_path / "names.txt").write_text("yes\nno\n")

    assert imported(root, tmp_path / "hub", labels=str(names))[0].require_card().labels == ("yes", "no")


def test_synsets_are_named_in_words(root: Path, tmp_path: Path) -> None:
    words = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}
    in_timm(tmp_path / "hub", model_config={"label_names": list(words), "label_descriptions": words})

    assert imported(root, tmp_path / "hub")[0].require_card().labels == tuple(words.values())


def test_names_by_number_may_have_gaps_in_timm(root: Path, tmp_path: Path) -> None:
    in_timm(tmp_path / "hub", model_config={"label_names": {0: "wren", 2: "kite"}})

    assert imported(root, tmp_path / "hub")[0].require_card().labels == ("wren", "class 1", "kite")


def test_a_config_of_timm_in_the_older_form_is_read(root: Path, tmp_path: Path) -> None:
    in_timm(tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    content = json.loads(path.read_text())
    flat = {"architecture": "pvt_v2_b0", "labels": list(BIRDS), **content["pretrained_cfg"], "crop_pct": 0.7}
    path.write_text(json.dumps(flat))

    card = imported(root, tmp_path / "hub")[0].require_card()

    assert (card.labels, card.preprocessing.crop) == (BIRDS, 0.7)


@pytest.mark.parametrize("name", ["best.pth", "weights.safetensors"])
def test_a_folder_with_a_weights_file_alone_is_that_file(root: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    state = dict(official(3))
    content = pickled({"state_dict": state}) if name.endswith(".pth") else safetensors.torch.save(state)
    (tmp_path / "run" / name).write_bytes(content)
    (tmp_path / "run" / "log.txt").write_text("epoch 1")

    stored, notes = imported(root, tmp_path / "run")

    assert (stored.id, stored.require_card().labels) == ("pvt_v2_b0.birds", ("class 0", "class 1", "class 2"))
    assert f"found {name}: pvt_v2_b0" in notes


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, "model.safetensors"),
        ({INDEX, "pytorch_model.bin", "model-00001-of-00001.safetensors"}, INDEX),
        ({"model.safetensors", "training_args.bin", "optimizer.pt", "rng_state.pth"}, "model.safetensors"),
        ({"weights.pt", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"}, "weights.pt"),
        ({"checkpoint-9.pth.tar", "last.pth.tar", "model_best.pth.tar"}, "model_best.pth.tar"),
        ({"best.safetensors", "best.pth"}, "best.safetensors"),
        (
            {"model.fp16.safetensors.index.json", "model.fp16-00001-of-00002.safetensors"},
            "model.fp16.safetensors.index.json",
        ),
    ],
)
def test_the_weights_are_found_among_other_files(names: set[str], wanted: str) -> None:
    assert weights_among(names | {"config.json", "README.md"}, "birds")[0] == wanted


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"a.pth", "b.pth"}, InvalidRequest, "birds has several checkpoints: a.pth, b.pth; name the one that is meant"),
        ({"model-00001-of-00002.safetensors"}, WeightsUnavailable, r"has shards \(model-0.* but not their index"),
        ({"notes.txt"}, WeightsUnavailable, r"birds has no weights .*, but notes\.txt"),
        (set(), WeightsUnavailable, "birds has no weights .*, but nothing"),
    ],
)
def test_a_folder_without_one_model_says_what_it_has(names: set[str], error: type[ServiceError], message: str) -> None:
    with pytest.raises(error, match=message):
        weights_among(names, "birds")


def changed(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def lack(folder: Path) -> None:
    file = first_shard(folder)
    state = safetensors.torch.load_file(file)
    state.pop(min(state))
    safetensors.torch.save_file(state, file)


def to_elsewhere(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        changed(folder / INDEX, lambda content: content["weight_map"].update({"classifier.bias": name}))

    return change


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        pytest.param(
            lambda f: first_shard(f).unlink(),
            WeightsUnavailable,
            r"1 of 4 shards are missing: model-00001-of",
            id="missing",
        ),
        pytest.param(
            lambda f: first_shard(f).write_bytes(b"x" * 99),
            WeightsCorrupt,
            "model-00001-of-00004.safetensors: trunc",
            id="broken",
        ),
        pytest.param(lack, WeightsCorrupt, r"model-00001.* it lacks .*, which the index says", id="a tensor less"),
        pytest.param(
            to_elsewhere("../secret.safetensors"),
            WeightsCorrupt,
            r"'\.\./secret\.safetensors', which is no file beside",
            id="above",
        ),
        pytest.param(
            to_elsewhere("/etc/passwd"),
            WeightsCorrupt,
            "'/etc/passwd', which is no file beside it; refused",
            id="absolute",
        ),
        pytest.param(
            to_elsewhere("..\\secret.bin"), WeightsCorrupt, "which is no file beside it", id="above in Windows"
        ),
        pytest.param(
            to_elsewhere("config.json"), WeightsCorrupt, "'config.json', which is no weights file", id="another file"
        ),
        pytest.param(
            lambda f: (f / INDEX).write_text("{"), WeightsCorrupt, "no index of shards: .*Invalid JSON", id="no JSON"
        ),
        pytest.param(
            lambda f: (f / INDEX).write_text('{"weight_map": {}}'), WeightsCorrupt, "it names 0 shards", id="empty"
        ),
        pytest.param(
            lambda f: (f / INDEX).write_text('{"weight_map": [1]}'),
            WeightsCorrupt,
            "weight_map: Input should be",
            id="a list",
        ),
        pytest.param(
            lambda f: shutil.copy(first_shard(f), f / "model-00002-of-00004.safetensors"),
            WeightsCorrupt,
            "model-00002.* it lacks",
            id="one twice",
        ),
    ],
)
def test_shards_that_are_not_whole_are_refused_and_nothing_stays(
    root: Path, tmp_path: Path, spoil: Callable[[Path], None], error: type[ServiceError], message: str
) -> None:
    in_transformers(tmp_path / "hub", shards=True)
    (tmp_path / "secret.safetensors").write_bytes(first_shard(tmp_path / "hub").read_bytes())
    spoil(tmp_path / "hub")

    with pytest.raises(error, match=message):
        imported(root, tmp_path / "hub")
    assert Store(root).models() == []


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/pvt-serve-test-was-here",)


def test_code_in_a_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(pickled({"head.bias": Code()}))
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"head.bias": "pytorch_model-00001-of-00001.bin"}}))

    with pytest.raises(WeightsUnsafe, match=r"asks for posix\.system"):
        read_shards(index)


def test_a_shard_of_a_tensor_that_claims_more_than_its_bytes_is_refused(root: Path, tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(10**9)
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(pickled({"head.bias": huge}))
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"head.bias": "pytorch_model-00001-of-00001.bin"}}))

    with pytest.raises(WeightsCorrupt, match="no dense tensor of the file"):
        imported(root, tmp_path)


CONFIGS: list[tuple[str, Callable[[Any], None], type[ServiceError], str]] = [
    (
        "transformers",
        lambda c: c.update(model_type="vit", architectures=["ViTForImageClassification"]),
        WeightsMismatch,
        r"it is of a \['ViTForImageClassification'\], model_type 'vit'; only transformers' 'pvt_v2'",
    ),
    (
        "transformers",
        lambda c: c.update(num_attention_heads=[1, 2, 5, 4]),
        WeightsMismatch,
        r"nearest is pvt_v2_b0, but for num_attention_heads \(1, 2, 5, 4\) \(not \(1, 2, 5, 8\)\)",
    ),
    ("transformers", lambda c: c.update(hidden_act="relu"), WeightsMismatch, "hidden_act relu .not gelu."),
    ("transformers", lambda c: c.update(num_channels=1), WeightsMismatch, "num_channels 1 .not 3."),
    ("transformers", lambda c: c.update(depths=[3, 4, 6, 3]), WeightsMismatch, "nearest is pvt_v2_b0, but for depths"),
    ("transformers", lambda c: c.update(depths="many"), InvalidRequest, r"config\.json: depths: Input should be"),
    ("transformers", lambda c: c["id2label"].pop("1"), InvalidRequest, "id2label: it names class 2, but its 2 classes"),
    (
        "transformers",
        lambda c: c["id2label"].update({"3": "owl"}),
        InvalidRequest,
        r"config\.json names 4 classes, and the head has 3; --labels FILE names them",
    ),
    (
        "timm",
        lambda c: c.update(architecture="resnet50"),
        WeightsMismatch,
        "it is of timm's 'resnet50'; served are pvt",
    ),
    ("timm", lambda c: c["model_args"].update(depths=[1, 1, 1, 1]), WeightsMismatch, r"than pvt_v2_b0: depths \[1, 1"),
    (
        "timm",
        lambda c: c["pretrained_cfg"].update(crop_mode="border"),
        InvalidRequest,
        "crop_mode 'border' with crop_pct",
    ),
    (
        "timm",
        lambda c: c["pretrained_cfg"].update(interpolation="random"),
        InvalidRequest,
        "interpolation: Input should",
    ),
    (
        "timm",
        lambda c: c["pretrained_cfg"].update(input_size=[1, 64, 64]),
        InvalidRequest,
        "three channels here, not 1",
    ),
    ("timm", lambda c: c.update(num_classes=5), InvalidRequest, "names 5 classes, and the head has 3"),
    ("timm", lambda c: c.update(label_names=["wren", "kite"]), InvalidRequest, "names 2 classes, and the head has 3"),
    ("timm", lambda c: c.update(label_names={"7": "kite"}), InvalidRequest, "it names class 7, but its 3 classes"),
]


@pytest.mark.parametrize("case", CONFIGS, ids=lambda case: case[3][:30])
def test_a_config_of_another_model_is_refused_by_what_differs(
    root: Path, tmp_path: Path, case: tuple[str, Callable[[Any], None], type[ServiceError], str]
) -> None:
    library, change, error, message = case
    (in_timm if library == "timm" else in_transformers)(tmp_path / "hub")
    changed(tmp_path / "hub" / "config.json", change)

    with pytest.raises(error, match=message):
        imported(root, tmp_path / "hub")
    assert Store(root).models() == []


@pytest.mark.parametrize(
    ("text", "message"), [("{", "no JSON"), ("[1]", "JSON, but no object"), ("[" * 100_000, "no JSON")]
)
def test_a_config_that_is_none_is_named(root: Path, tmp_path: Path, text: str, message: str) -> None:
    in_timm(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text(text)

    with pytest.raises(InvalidRequest, match=rf"config\.json: {message}.*import the weights file alone"):
        imported(root, tmp_path / "hub")


def test_the_variant_is_found_and_another_that_is_named_is_refused(root: Path, tmp_path: Path) -> None:
    in_timm(tmp_path / "hub")

    with pytest.raises(InvalidRequest, match=r"variant pvt_v2_b1: config\.json says pvt_v2_b0; leave --variant out"):
        imported(root, tmp_path / "hub", variant="b1")
    assert imported(root, tmp_path / "hub", variant="b0")[0].variant == "pvt_v2_b0"
    (tmp_path / "hub" / "config.json").unlink()
    assert imported(root, tmp_path / "hub")[0].variant == "pvt_v2_b0"


def test_a_folder_that_is_not_there_is_no_folder(tmp_path: Path) -> None:
    assert not is_folder(tmp_path / "nowhere")
    with pytest.raises(WeightsUnavailable, match="No such file"):
        read_folder(tmp_path / "nowhere" / INDEX)
