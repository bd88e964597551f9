"""The commands that read and write a model store, but for `pvt-serve alias`."""

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import PvtV2Config, PvtV2Model

from service.acquisition.catalogue import imagenet_labels
from service.acquisition.preprocessing import PRESETS, describe
from service.architecture.variants import Dialect
from service.architecture.weights import read_checkpoint, remap_keys
from service.store.cards import ModelCard
from service.store.location import StoreIndex
from service.store.store import Store
from tests.cli.conftest import Done, PvtServe
from tests.service.architecture.test_weights import in_lucid, in_timm
from tests.service.checkpoints import checkpoint, official, path_of, pickled, transformers_state
from tests.service.hub import Fault, Hub, serving_hub
from tests.service.remotes import add_small
from tests.service.stores import add_model

TINY = "pvt_v2_b0.tiny"


@pytest.fixture(autouse=True)
def _quick_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.acquisition.pulling.SIDE", 32)
    torch.set_num_threads(1)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_hub() as hub:
        monkeypatch.setenv("PVT_MIRROR", hub.url)
        yield hub


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "store"
    add_model(root, TINY)
    monkeypatch.setenv("PVT_MODEL_STORE", str(root))
    return root


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A checkpoint of three classes."""
    save_file(in_timm(dict(official(3))), path := tmp_path / "best.safetensors")
    return path


def test_pull_fetches_once_and_says_what_was_checked(pvt_serve: PvtServe, store: Path, hub: Hub) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    first, second = pvt_serve("pull", "b0"), pvt_serve("pull", "pvt_v2_b0.in1k")

    assert (first.code, second.code) == (0, 0)
    assert first.out == "pvt_v2_b0.in1k@1: 14.7 MB from timm, SHA-256 as the hub gives it\n"
    assert second.out == "pvt_v2_b0.in1k@1 is in the store already; --again fetches it as a new version\n"
    assert len(hub.requests) == 1
    assert Store(store).find("pvt_v2_b0").require_card().labels == imagenet_labels()


def test_pull_says_plainly_what_is_trusted_without_a_published_digest(
    pvt_serve: PvtServe, store: Path, hub: Hub
) -> None:
    hub.put(path_of("official"), checkpoint("official"))
    other = store.parent / "other"

    done = pvt_serve("pull", "b0", "--source", "official", "--store", other)

    assert "which nobody has published: the first file fetched is trusted" in done.out
    assert [model.id for model in Store(other).models()] == ["pvt_v2_b0.in1k"]


@pytest.mark.usefixtures("store")
def test_pull_all_goes_on_after_one_that_fails(pvt_serve: PvtServe, hub: Hub) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))

    done = pvt_serve("pull", "--all")

    assert done.code == 3
    assert done.out.startswith("pvt_v2_b0.in1k@1: 14.7 MB")
    assert done.err.count("answers 404: there is no such file") == 6


@pytest.mark.usefixtures("store", "hub")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pull"], 2, "name the models to pull"),
        (["pull", "b0", "--all"], 2, "or give --all"),
        (["pull", "b9"], 2, "no published weights are known for 'b9'; there are: pvt_v2_b0"),
        (["pull", "b2_li", "--source", "lucid"], 2, "lucid has no pvt_v2_b2_li; these have: timm, opengvlab, official"),
        (["pull", "b0"], 1, "answers 404: there is no such file; try another --source"),
        (["pull", "b0", "--store", "s3://bucket"], 2, "works on a store in a folder"),
        (["pull", "b0", "--source", "elsewhere"], 2, "elsewhere"),
    ],
)
def test_pull_says_in_a_line_what_it_can_not_do(
    pvt_serve: PvtServe, arguments: list[str], code: int, message: str
) -> None:
    done = pvt_serve(*arguments)

    assert (done.code, message in done.err) == (code, True)
    assert "Traceback" not in done.err


@pytest.mark.usefixtures("store")
def test_retries_are_reported_on_standard_error(pvt_serve: PvtServe, hub: Hub) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    hub.faults = [Fault(status=503, headers={"Retry-After": "0"})]

    done = pvt_serve("pull", "b0")

    assert "503 Service Unavailable" in done.err
    assert done.lines == ["pvt_v2_b0.in1k@1: 14.7 MB from timm, SHA-256 as the hub gives it"]


DIALECTS: dict[Dialect, Callable[[], dict[str, torch.Tensor]]] = {
    "official": lambda: dict(official(3)),
    "timm": lambda: in_timm(dict(official(3))),
    "lucid": lambda: in_lucid(dict(official(3))),
    "transformers": lambda: transformers_state(3),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_import_reads_every_dialect_in_both_formats(
    pvt_serve: PvtServe, store: Path, dialect: Dialect, suffix: str
) -> None:
    state = DIALECTS[dialect]()
    file = store.parent / f"best{suffix}"
    file.write_bytes(safetensors.torch.save(state) if suffix == ".safetensors" else pickled({"state_dict": state}))

    done = pvt_serve("import", file, "--variant", "b0", "--tag", "mine", "--size", "32")

    assert done.out == "pvt_v2_b0.mine@1: 3 classes, 3,410,531 parameters, input 32x32\n".replace(
        "3,410,531", f"{sum(t.numel() for t in remap_keys(state).values()):,}"
    )
    stored = Store(store).find("pvt_v2_b0.mine")
    card = stored.require_card()
    found = read_checkpoint(stored.folder / card.weights.file)
    assert all(torch.equal(found[name], tensor) for name, tensor in remap_keys(state).items())
    assert card.reference
    assert card.labels == ("class 0", "class 1", "class 2")
    assert pvt_serve("verify").code == 0


def test_import_takes_geometry_labels_and_provenance(pvt_serve: PvtServe, store: Path, mine: Path) -> None:
    (labels := store.parent / "labels.txt").write_text("cat\ndog\nbird\n")
    pvt_serve(
        "import", mine, "--variant", "pvt_v2_b0", "--tag", "mine", "--labels", labels, "--size", "32x64", "--crop", "1",
        "--interpolation", "bilinear", "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25",
        "--licence", "MIT", "--source", "our lab", "--version", "7",
    )  # fmt: skip

    stored = Store(store).find("pvt_v2_b0.mine")
    card = stored.require_card()
    assert (stored.version, card.labels, card.licence, card.source) == ("7", ("cat", "dog", "bird"), "MIT", "our lab")
    assert card.preprocessing.model_dump() == {
        "height": 32, "width": 64, "resize": "shorter_side_crop", "crop": 1.0, "rounding": "floor",
        "interpolation": "bilinear", "kernel": "torchvision", "antialias": True, "fill": None, "colours": "rgb",
        "mean": (0.5,) * 3, "std": (0.25,) * 3,
    }  # fmt: skip


def imported(pvt_serve: PvtServe, store: Path, file: Path, *options: str | Path) -> tuple[Done, ModelCard]:
    done = pvt_serve("import", file, "--variant", "b0", "--tag", "mine", "--size", "64", *options)
    assert done.code == 0, done.err
    return done, Store(store).find("pvt_v2_b0.mine").require_card()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_import_takes_the_preprocessing_of_the_library_whose_names_the_file_has(
    pvt_serve: PvtServe, store: Path, dialect: Dialect
) -> None:
    (file := store.parent / "best.pth").write_bytes(pickled({"state_dict": DIALECTS[dialect]()}))

    done, card = imported(pvt_serve, store, file)

    assert card.preprocessing == PRESETS[dialect].model_copy(update={"height": 64, "width": 64})
    assert f"tensor names of {dialect}; images: {describe(card.preprocessing)}" in done.err


def test_import_reads_what_transformers_wrote_beside_the_weights(pvt_serve: PvtServe, store: Path) -> None:
    said = {"size": {"height": 96, "width": 128}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (store.parent / "preprocessor_config.json").write_text(json.dumps(said))
    (file := store.parent / "model.safetensors").write_bytes(safetensors.torch.save(transformers_state(3)))

    done = pvt_serve("import", file, "--variant", "b0", "--tag", "mine")

    assert done.code == 0
    pixels = Store(store).find("pvt_v2_b0.mine").require_card().preprocessing
    assert (pixels.height, pixels.width, pixels.resize, pixels.interpolation) == (96, 128, "stretch", "bilinear")
    assert (pixels.mean, pixels.std) == ((0.5,) * 3, (0.25,) * 3)


def test_import_says_which_of_several_weights_it_takes(pvt_serve: PvtServe, store: Path) -> None:
    plain, ema = dict(official(3)), {name: tensor / 2 for name, tensor in official(3).items()}
    (file := store.parent / "best.pth").write_bytes(pickled({"state_dict": plain, "state_dict_ema": ema}))

    for options, told, wanted in (
        ([], "EMA weights ('state_dict_ema'), as timm evaluates; --weights plain takes the others", ema),
        (["--weights", "plain"], "plain weights, as requested", plain),
    ):
        done, card = imported(pvt_serve, store, file, *options)
        assert told in done.err
        stored = Store(store).find("pvt_v2_b0.mine")
        found = read_checkpoint(stored.folder / card.weights.file)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_mean_and_std_of_0_to_255_are_converted_and_shown(pvt_serve: PvtServe, store: Path, mine: Path) -> None:
    levels = ["--mean", "123.675", "116.28", "103.53", "--std", "58.395", "57.12", "57.375"]

    done, card = imported(pvt_serve, store, mine, *levels)

    assert card.preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))
    assert card.preprocessing.std == pytest.approx((0.229, 0.224, 0.225))
    assert "mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in done.err


def test_a_head_of_one_logit_is_refused_and_what_is_advised_works(pvt_serve: PvtServe, store: Path) -> None:
    (file := store.parent / "one.pth").write_bytes(pickled(dict(official(1))))
    command = ("import", file, "--variant", "b0", "--tag", "mine", "--size", "32")
    refused, softmax = pvt_serve(*command), pvt_serve(*command, "--activation", "softmax", "--temperature", "2")
    done = pvt_serve(*command, "--activation", "sigmoid")

    assert (refused.code, softmax.code, done.code) == (1, 1, 0)
    for each in (refused, softmax):
        assert "the head has one logit, of which a softmax always makes 1.0" in each.err
        assert "add --activation sigmoid where" in each.err
    card = Store(store).find("pvt_v2_b0.mine").require_card()
    assert (card.labels, card.activation) == (("class 0",), "sigmoid")


def test_import_takes_what_answers_are(pvt_serve: PvtServe, store: Path, mine: Path) -> None:
    for name in ("dog", "Cat", "bird"):
        (store.parent / "set" / name).mkdir(parents=True)
    (thresholds := store.parent / "thresholds.csv").write_text("label,threshold\r\nCat,0.2\r\nbird,0.3\r\ndog,0.4\r\n")
    _, card = imported(
        pvt_serve, store, mine, "--labels", store.parent / "set", "--activation", "sigmoid", "--temperature", "1.5",
        "--thresholds", thresholds, "--unknown-below", "0.1",
    )  # fmt: skip

    assert card.labels == ("Cat", "bird", "dog")
    assert (card.activation, card.temperature, card.unknown_below) == ("sigmoid", 1.5, 0.1)
    assert card.thresholds == (0.2, 0.3, 0.4)
    assert json.loads((store / card.id / "1" / "card.json").read_text())["format"] == 3


def test_import_notes_a_label_that_is_there_twice(pvt_serve: PvtServe, store: Path, mine: Path) -> None:
    (labels := store.parent / "labels.txt").write_text("crane\nowl\ncrane\n")

    done, card = imported(pvt_serve, store, mine, "--labels", labels)

    assert "classes 0 and 2 are both called 'crane'; tell them by class_id" in done.err
    assert card.labels == ("crane", "owl", "crane")


@pytest.mark.parametrize("classes", [3, 0])
@pytest.mark.usefixtures("local_engine")
def test_the_line_that_an_import_prints_to_type_next_works(
    pvt_serve: PvtServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    state = {name: tensor for name, tensor in official(3).items() if classes or not name.startswith("head")}
    (file := tmp_path / "best.pth").write_bytes(pickled(state))
    Image.new("RGB", (32, 32), "red").save(image := tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)

    done = pvt_serve("import", file, "--tag", "mine", "--size", "32", "--store", tmp_path / "my store")
    (line,) = [each.removeprefix("next: ") for each in done.err.splitlines() if each.startswith("next: ")]
    setting, command, *arguments = shlex.split(line)
    name, _, value = setting.partition("=")
    monkeypatch.setenv(name, value)

    assert (command, arguments[-1]) == ("pvt-serve", "IMAGE")
    assert pvt_serve(*arguments[:-1], image).code == 0


@pytest.mark.parametrize("library", ["timm", "transformers", "official"])
def test_a_checkpoint_without_a_head_is_imported_for_its_embeddings(
    pvt_serve: PvtServe, store: Path, library: str
) -> None:
    state = dict(official(3))
    if library == "timm":
        torch.manual_seed(0)
        state = timm.create_model("pvt_v2_b0", num_classes=0).state_dict()
    elif library == "transformers":
        config = PvtV2Config(hidden_sizes=(32, 64, 160, 256), depths=(2, 2, 2, 2))
        state = PvtV2Model(config).state_dict()
    headless = {name: tensor for name, tensor in state.items() if not name.startswith(("head", "classifier"))}
    (file := store.parent / "backbone.pth").write_bytes(pickled(headless))
    (labels := store.parent / "labels.txt").write_text("a\nb\nc")
    command = ("import", file, "--variant", "b0", "--tag", "mine", "--size", "32")

    refused = pvt_serve(*command, "--labels", labels)
    answers = pvt_serve(*command, "--activation", "sigmoid")
    done, card = imported(pvt_serve, store, file)

    assert (refused.code, answers.code) == (1, 2)
    assert "no classification head ('head.weight'), and 3 labels, from 'a' to 'c', were given" in refused.err
    assert "a model without a head has no activation" in answers.err
    assert done.out.startswith("pvt_v2_b0.mine@1: no head: embeddings only, 3,")
    assert card.labels == ()
    assert "ok   pvt_v2_b0.mine@1  8 reference outputs reproduced" in pvt_serve("verify").lines


def test_a_head_without_classes_is_refused(pvt_serve: PvtServe, store: Path) -> None:
    state = {name: tensor[:0] if name.startswith("head.") else tensor for name, tensor in official(1).items()}
    (file := store.parent / "none.pth").write_bytes(pickled(state))

    refused = pvt_serve("import", file, "--variant", "b0", "--tag", "mine", "--size", "32")

    assert refused.code == 1
    assert "the head has no classes" in refused.err


def test_importing_again_makes_the_next_version(pvt_serve: PvtServe, mine: Path, store: Path) -> None:
    for version in ("1", "2"):
        done = pvt_serve("import", mine, "--variant", "b0", "--tag", "mine", "--size", "32")
        assert done.out.startswith(f"pvt_v2_b0.mine@{version}:")

    assert Store(store).find("pvt_v2_b0.mine").version == "2"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.json", '["a", "b", "c"]'),
        ("id2label.json", '{"0": "a", "2": "c", "1": "b"}'),
        ("config.json", '{"id2label": {"0": "a", "1": "b", "2": "c"}, "hidden": 3}'),
        ("labels.txt", "a\nb\nc"),
    ],
)
def test_labels_come_in_several_forms(pvt_serve: PvtServe, store: Path, mine: Path, name: str, text: str) -> None:
    (labels := store.parent / name).write_text(text)
    pvt_serve("import", mine, "--variant", "b0", "--tag", "mine", "--size", "32", "--labels", labels)

    assert Store(store).find("pvt_v2_b0.mine").require_card().labels == ("a", "b", "c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "b9"], "variant 'b9': it must be one of pvt_v2_b0"),
        (["--variant", "b2_li"], "pvt_v2_b0, not pvt_v2_b2_li"),
        (["--tag", "a/b"], "tag 'a/b': it has letters, digits"),
        (["--version", "0"], "version '0': it is a number from 1"),
        (["--size", "16"], "height: Input should be greater than or equal to 32"),
        (["--std", "0", "1", "1"], "Input should be greater than 0"),
        (["--std", "nan", "1", "1"], "std nan 1 1: each must be a number"),
        (["--mean", "123.675", "116.28", "103.53"], "give both in one scale"),
        (["--size", "big"], "--size big: it must be a number of pixels"),
        (["--crop", "0.9", "--resize", "stretch"], "a stretch has no crop"),
        (["--crop", "1.2"], "crop: Input should be less than or equal to 1"),
        (["--weights", "ema"], "it holds no EMA weights"),
        (
            ["--labels", "imagenet"],
            "the head has 3 classes, and there are 1000 labels, from 'tench, Tinca tinca' to 'toilet",
        ),
        (["--activation", "relu"], "'relu' is not one of 'softmax', 'sigmoid', 'none'"),
        (["--activation", "none", "--temperature", "2"], "so there is no temperature"),
        (["--temperature", "0"], "temperature: Input should be greater than or equal to 0.001"),
        (["--temperature", "nan"], "temperature"),
        (["--thresholds", "1.5"], "thresholds 1.5: scores of a softmax are from 0 to 1"),
        (["--thresholds", "nowhere.txt"], "thresholds 'nowhere.txt': No such file"),
        (["--unknown-below", "-1"], "unknown_below -1: scores of a softmax"),
        (["--labels", "nowhere.txt"], "labels 'nowhere.txt': No such file"),
    ],
)
def test_import_says_what_is_wrong_and_changes_nothing(
    pvt_serve: PvtServe, store: Path, mine: Path, arguments: list[str], message: str
) -> None:
    done = pvt_serve("import", mine, "--variant", "b0", "--tag", "mine", "--size", "32", *arguments)

    assert done.code != 0
    assert message in done.err
    assert [model.id for model in Store(store).models()] == [TINY]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", lambda: safetensors.torch.save(dict(official(3)))[:-100], "truncated, or neither"),
        ("x.pth", lambda: b"hello", "truncated, or neither"),
        ("x.onnx", lambda: b"hello", "truncated, or neither"),
        ("x.pth", lambda: pickled({k: v * torch.nan for k, v in official(3).items()}), "NaN or infinity"),
        ("x.pth", lambda: pickled({**official(3), "head.bias": print}), "asks for print"),
    ],
)
def test_a_bad_checkpoint_is_refused_with_the_reason(
    pvt_serve: PvtServe, store: Path, name: str, content: Callable[[], bytes], message: str
) -> None:
    (file := store.parent / name).write_bytes(content())
    done = pvt_serve("import", file, "--variant", "b0", "--tag", "mine", "--size", "32")

    assert (done.code, message in done.err) == (1, True)
    assert [model.id for model in Store(store).models()] == [TINY]


def test_ls_lists_every_version_and_what_could_be_pulled(pvt_serve: PvtServe, store: Path, mine: Path) -> None:
    pvt_serve("import", mine, "--variant", "b0", "--tag", "mine", "--size", "32")
    Store(store).set_alias("production", "pvt_v2_b0.mine@1")
    (store / TINY / "1" / "card.json").write_text("{")

    rows = json.loads(pvt_serve("ls", "--all", "--json").out)["models"]
    table = pvt_serve("ls").lines

    assert [(row["id"], row["state"]) for row in rows[:2]] == [("pvt_v2_b0.mine", "available"), (TINY, "failed")]
    assert rows[0]["aliases"] == ["production"]
    assert [row["state"] for row in rows[2:]] == ["remote"] * 7
    assert any("production" in line and "best.safetensors" in line for line in table)
    assert any("failed" in line for line in table)
    assert "card.json" in "".join(line.strip() for line in table)  # below its row, since the paths of tests are long


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_verify_finds_every_kind_of_damage_and_exits_with_1(pvt_serve: PvtServe, store: Path, mine: Path) -> None:
    for _ in range(4):
        pvt_serve("import", mine, "--variant", "b0", "--tag", "mine", "--size", "32")
    model = store / "pvt_v2_b0.mine"
    damage(model / "1" / "model.safetensors")
    damage(model / "2" / "reference.safetensors")
    card = json.loads((model / "3" / "card.json").read_text())
    card["preprocessing"]["mean"] = [0.1, 0.1, 0.1]
    (model / "3" / "card.json").write_text(json.dumps(card))
    (store / "aliases.json").write_text('{"production": "pvt_v2_b0.mine@9"}')

    done, as_json = pvt_serve("verify"), json.loads(pvt_serve("verify", "--json").out)["verdicts"]

    assert done.code == 1
    assert done.err == "pvt-serve: 4 of 6 are not as they should be\n"
    by_name = {line.split()[1].rstrip(":"): line for line in done.lines}
    assert "ok   pvt_v2_b0.mine@4  8 reference outputs reproduced" in done.lines
    assert by_name[f"{TINY}@1"].endswith("no reference outputs")
    assert "SHA-256 is" in by_name["pvt_v2_b0.mine@1"]
    assert "SHA-256 is" in by_name["pvt_v2_b0.mine@2"]
    assert "does not give its reference outputs: logits are off by" in by_name["pvt_v2_b0.mine@3"]
    assert "which is not in the store" in by_name["production"]
    assert [verdict["failure"] is None for verdict in as_json].count(True) == 2


def test_rm_removes_a_version_then_the_rest(pvt_serve: PvtServe, store: Path) -> None:
    add_model(store, TINY, "2")

    assert pvt_serve("rm", f"{TINY}@2", "--yes").out == f"removed {TINY}@2\n"
    assert Store(store).find(TINY).version == "1"
    assert pvt_serve("rm", TINY, "--yes").code == 0
    assert Store(store).models() == []
    assert [path.name for path in store.iterdir()] == []


def test_rm_of_the_last_version_leaves_no_empty_model_in_a_store_named_from_here(
    pvt_serve: PvtServe, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)

    assert pvt_serve("rm", f"{TINY}@1", "--yes", "--store", store.name).code == 0
    assert [path.name for path in store.iterdir()] == []


def test_rm_asks_and_takes_no_for_an_answer(pvt_serve: PvtServe, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.confirm", lambda *_, **__: (_ for _ in ()).throw(SystemExit(1)))
    assert pvt_serve("rm", TINY).code == 1

    assert Store(store).find(TINY).card


def test_rm_leaves_what_an_alias_stands_for(pvt_serve: PvtServe, store: Path) -> None:
    Store(store).set_alias("production", f"{TINY}@1")

    done = pvt_serve("rm", TINY, "--yes")

    assert (done.code, "'production' stands for" in done.err) == (2, True)
    assert Store(store).find(TINY).card


@pytest.mark.usefixtures("store")
def test_rm_of_what_is_not_there_says_so(pvt_serve: PvtServe) -> None:
    assert "no model 'pvt_v2_b0.none'" in pvt_serve("rm", "pvt_v2_b0.none", "--yes").err
    assert "has no version '9'" in pvt_serve("rm", f"{TINY}@9", "--yes").err


@pytest.mark.usefixtures("local_engine")
def test_models_lists_the_store_without_loading_a_model(pvt_serve: PvtServe) -> None:
    done = pvt_serve("models")

    assert "pvt_v2_b0.digits (default)" in done.out
    assert "available" in done.out
    assert done.code == 0


def test_models_as_json_are_those_of_the_service(pvt_serve: PvtServe, service_url: str) -> None:
    model, *_ = json.loads(pvt_serve("models", "--json", "--url", service_url).out)["models"]

    assert (model["id"], model["num_classes"]) == ("pvt_v2_b0.digits", 10)


def test_index_lists_every_file_of_every_model_and_the_aliases(
    pvt_serve: PvtServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = add_small(tmp_path)
    (tmp_path / "aliases.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (folder / ".hidden").touch()
    monkeypatch.setenv("PVT_MODEL_STORE", str(tmp_path))

    done = pvt_serve("index")

    assert "index.json: 3 files, 0.1 MB" in done.out
    files = StoreIndex.model_validate_json((tmp_path / "index.json").read_bytes()).files
    assert [file.path for file in files] == [
        "pvt_v2_b0.tiny/1/card.json",
        "pvt_v2_b0.tiny/1/model.safetensors",
        "aliases.json",
    ]


def test_index_of_a_missing_folder_is_refused(pvt_serve: PvtServe, tmp_path: Path) -> None:
    done = pvt_serve("index", tmp_path / "nowhere")

    assert (done.code, "can't be read" in done.err) == (1, True)


def test_index_of_a_store_by_url_is_refused(pvt_serve: PvtServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_MODEL_STORE", "memory://store")
    done = pvt_serve("index")

    assert (done.code, "name the FOLDER" in done.err) == (2, True)
