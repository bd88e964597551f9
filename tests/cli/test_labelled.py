"""`pvt-serve check` and `fit`, on the digits and on photos."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.pvt_v2 import checkpoint_filter_fn

from service.architecture.weights import read_checkpoint
from service.images.geometry import Interpolation, Resize
from service.store.cards import ModelCard, Preprocessing, read_card
from service.store.folder import write_model
from service.store.store import Store
from tests.app.processes import LIGHT, post, serving
from tests.cli.conftest import PvtServe
from tests.service.stores import add_model
from training.digits import Digits, render, split

BACKBONE = "pvt_v2_b0.digits"


@pytest.fixture
def store(tmp_path: Path, model_store: Path, local_engine: None, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001  it sets variables
    """With the embedded model, which runs in float32."""
    root = tmp_path / "store"
    root.mkdir()
    (root / BACKBONE).symlink_to(model_store / BACKBONE)
    for name, value in {"MODEL_STORE": str(root), "PRECISION": "float32", "MAX_BATCH_SIZE": "8"}.items():
        monkeypatch.setenv(f"PVT_{name}", value)
    return root


def folder_of(root: Path, digits: Digits, name: Callable[[int], str], count: int, start: int = 0) -> Path:
    """`count` of the digits, each in a sub-folder with its `name`."""
    for i in range(start, start + count):
        (folder := root / name(int(digits.labels[i]))).mkdir(parents=True, exist_ok=True)
        render(digits.pixels[i]).save(folder / f"{i}.png")
    return root


def parity(digit: int) -> str:
    return "odd" if digit % 2 else "even"


def wide(image: Image.Image) -> Image.Image:
    """An image whose content a centre crop loses, and a stretch keeps."""
    return image.resize((image.width * 3, image.height))


@pytest.mark.usefixtures("store")
def test_check_measures_what_predict_answers(pvt_serve: PvtServe, tmp_path: Path) -> None:
    root = folder_of(tmp_path / "test", split().held_out, str, 60)
    (root / "3" / "broken.png").write_bytes(b"no image")

    done = pvt_serve("check", BACKBONE, root, "--json", "--sample", "10")
    answers = pvt_serve("predict", "--json", "-k", "1", root)

    found = json.loads(done.out)
    lines = [json.loads(line) for line in answers.lines]
    right = sum(
        Path(each["file"]).parent.name == each["predictions"][0]["label"] for each in lines if "error" not in each
    )
    assert (done.code, found["images"], found["right"]) == (3, 60, right)
    assert [(Path(each["file"]).name, "not a supported image" in each["reason"]) for each in found["skipped"]] == [
        ("broken.png", True)
    ]
    assert (found["mapped_by"], found["mapped"]["7"], found["unmatched"]) == ("name", "7", [])
    assert sum(each["images"] for each in found["classes"]) == 60


@pytest.mark.usefixtures("store")
def test_check_tries_every_resize_and_interpolation_that_a_card_can_say(pvt_serve: PvtServe, tmp_path: Path) -> None:
    root = folder_of(tmp_path / "test", split().held_out, str, 10)

    tried = json.loads(pvt_serve("check", BACKBONE, root, "--json").out)["alternatives"]

    changes = [each["changes"] for each in tried]
    own = Preprocessing(height=64, width=64)
    assert {"crop": 0.9} in changes
    assert {"crop": 0.875} in changes
    assert {each["resize"] for each in changes if "resize" in each} == {*Resize.__args__} - {own.resize}  # type: ignore[attr-defined]
    assert {each["interpolation"] for each in changes if "interpolation" in each} >= {
        *Interpolation.__args__  # type: ignore[attr-defined]
    } - {own.interpolation}
    assert not any(each["better"] for each in tried)


def test_check_finds_that_the_training_stretched_and_applies_it(
    pvt_serve: PvtServe, store: Path, tmp_path: Path
) -> None:
    digits, root = split().held_out, tmp_path / "test"
    for i in range(50):
        (folder := root / str(digits.labels[i])).mkdir(parents=True, exist_ok=True)
        wide(render(digits.pixels[i])).save(folder / f"{i}.png")
    command = ("check", "pvt_v2_b0.mine", root)
    card = read_card(store / BACKBONE / "1").model_copy(update={"id": "pvt_v2_b0.mine"})
    files = {
        name: (store / BACKBONE / "1" / name).read_bytes() for name in ("model.safetensors", "reference.safetensors")
    }
    write_model(
        store, None, card, files["model.safetensors"], {"reference.safetensors": files["reference.safetensors"]}
    )

    told, applied, after = pvt_serve(*command), pvt_serve(*command, "--apply"), pvt_serve(*command, "--json")

    better = re.search(r"preprocessing: resize stretch would be better: (\d+) of 50 right", told.out)
    assert better
    assert int(better[1]) >= 48
    assert f"to use it: pvt-serve check pvt_v2_b0.mine {root} --apply" in told.out
    assert "import the checkpoint again with --resize stretch" in told.out
    assert "pvt_v2_b0.mine@2 is the model with it" in applied.out
    found = json.loads(after.out)
    assert (found["version"], found["right"]) == ("2", int(better[1]))
    assert not any(each["better"] for each in found["alternatives"])
    assert Store(store).find("pvt_v2_b0.mine").require_card().accuracy is None


def test_check_fits_80_columns_whatever_the_labels(
    pvt_serve: PvtServe, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(store, "pvt_v2_b0.many", classes=30)
    root = tmp_path / "photos"
    for i in range(30):
        (folder := root / f"a folder with a very long name indeed, number {i:02}").mkdir(parents=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "1.png")
    monkeypatch.chdir(tmp_path)

    done = pvt_serve("check", "pvt_v2_b0.many", "photos", "--sample", "0")

    assert "30 of 30 sub-folders stand for labels, by the order of their names, as class_to_idx" in done.out
    assert "taken for" in done.out
    tables = [line for line in done.lines if "%" in line or "taken for" in line]
    assert max(map(len, tables)) <= 80


@pytest.mark.usefixtures("store")
def test_check_names_folders_that_are_no_labels_and_what_to_do(pvt_serve: PvtServe, tmp_path: Path) -> None:
    root = folder_of(tmp_path / "test", split().held_out, lambda digit: str(digit) if digit < 8 else f"x{digit}", 20)

    done = pvt_serve("check", BACKBONE, root, "--sample", "0")

    assert done.code == 0
    assert "left out, since no label has their names: 'x8', 'x9'; rename them to labels" in done.err


def test_a_fitted_model_answers_through_http_as_scikit_learn_does_on_timms_embeddings(
    pvt_serve: PvtServe, store: Path, tmp_path: Path
) -> None:
    data = split()
    root = folder_of(tmp_path / "train", data.train, parity, 150)
    test = folder_of(tmp_path / "test", data.held_out, parity, 40)
    with serving(model_store=str(store), **LIGHT, reload_seconds="0.05") as server:
        assert post(server.url, [("image", next(test.rglob("*.png")).read_bytes())]).status_code == 200

        done = pvt_serve("fit", root, "--model", BACKBONE, "--tag", "parity", "--json")
        paths = sorted(test.rglob("*.png"))
        url = f"{server.url}/predict?model=pvt_v2_b0.parity"
        response = httpx.post(url, files=[("image", path.read_bytes()) for path in paths], timeout=60)

    fitted = json.loads(done.out)
    backbone = timm.create_model("pvt_v2_b0", num_classes=0)
    state = _for_timm(backbone, store / BACKBONE / "1" / "model.safetensors")
    backbone.load_state_dict(state)

    def embed(files: list[Path]) -> Any:
        return backbone.eval()(torch.stack([_input(path) for path in files])).detach().double().numpy()

    train = sorted(root.rglob("*.png"))
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=fitted["strength"], max_iter=1000))
    theirs.fit(embed(train), [path.parent.name for path in train])
    shares = theirs.predict_proba(embed(paths)) ** (1 / fitted["temperature"])
    expected = shares / shares.sum(axis=1, keepdims=True)
    results = response.json()["results"]
    found = np.array([[_score(each, label) for label in ("even", "odd")] for each in results])
    assert done.code == 0
    assert np.abs(found - expected).max() < 1e-3
    right = sum(each["predictions"][0]["label"] == path.parent.name for each, path in zip(results, paths, strict=True))
    assert right >= 37


def _for_timm(model: torch.nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file with official names under timm's: both are in the order of the model."""
    state = {name: tensor for name, tensor in read_checkpoint(path).items() if not name.startswith("head.")}
    remapped: dict[str, torch.Tensor] = checkpoint_filter_fn(state, model)
    return remapped


def _input(path: Path) -> torch.Tensor:
    pixels = torch.tensor(np.asarray(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / std[:, None, None]


def _score(result: dict[str, Any], label: str) -> float:
    return next(float(each["score"]) for each in result["predictions"] if each["label"] == label)


def test_add_makes_the_next_version_from_earlier_embeddings_and_a_running_server_takes_it(
    pvt_serve: PvtServe, store: Path, tmp_path: Path
) -> None:
    data = split().train
    first = folder_of(tmp_path / "first", data, parity, 60)
    more = folder_of(tmp_path / "more", data, parity, 40, start=50)  # ten of them are in both
    moved = next(f"{i}.png" for i in range(50, 60) if data.labels[i] % 2)
    (more / "even" / moved).write_bytes((more / "odd" / moved).read_bytes())
    (more / "odd" / moved).unlink()
    (third := more / "blank").mkdir()
    for grey in range(3):
        Image.new("L", (64, 64), 100 * grey).save(third / f"{grey}.png")
    pvt_serve("fit", first, "--model", BACKBONE, "--tag", "parity")
    for path in first.rglob("*.png"):
        path.unlink()  # the images are not needed any more
    with serving(model_store=str(store), **LIGHT, reload_seconds="0.05") as server:
        url = f"{server.url}/predict?model=pvt_v2_b0.parity"
        sample = (third / "1.png").read_bytes()
        before = httpx.post(url, files={"image": sample}, timeout=60).json()

        done = pvt_serve("fit", more, "--add", "--model", "pvt_v2_b0.parity", "--json")
        server.event("model_replaced")
        after = httpx.post(url, files={"image": sample}, timeout=60).json()

    found = json.loads(done.out)
    assert (before["version"], after["version"], found["version"]) == ("1", "2", "2")
    assert {each["label"] for each in before["results"][0]["predictions"]} == {"even", "odd"}
    assert after["results"][0]["predictions"][0]["label"] == "blank"
    assert sum(found["classes"].values()) == 60 + 30 + 3
    assert list(found["classes"]) == ["even", "odd", "blank"]  # earlier classes keep their numbers
    assert (found["known"], found["moved"]) == (9, 1)
    kept = safetensors.numpy.load_file(store / "pvt_v2_b0.parity" / "2" / "embeddings.safetensors")
    assert {name: len(each) for name, each in kept.items()} == {"embeddings": 93, "classes": 93, "digests": 93}
    assert pvt_serve("verify").code == 0


def test_fit_lists_what_it_leaves_out_and_learns_from_the_rest(
    pvt_serve: PvtServe, store: Path, tmp_path: Path
) -> None:
    root = folder_of(tmp_path / "train", split().train, parity, 40)
    image = next((root / "odd").iterdir())
    (root / "odd" / "deep").mkdir()
    (root / "odd" / "deep" / "copy.png").write_bytes(image.read_bytes())
    for name in ("even", "odd"):
        render(split().held_out.pixels[0]).save(root / name / "both.png")
    (root / "even" / "broken.jpg").write_bytes(b"no image")
    (root / "even" / "notes.txt").write_text("text")
    (root / "lonely").mkdir()
    Image.new("L", (64, 64)).save(root / "lonely" / "1.png")

    done = pvt_serve("fit", root, "--model", BACKBONE, "--tag", "parity")
    as_json = json.loads(pvt_serve("fit", root, "--model", BACKBONE, "--tag", "parity", "--json").out)

    assert done.code == 3
    reasons = {Path(each["file"]).name: each["reason"] for each in as_json["skipped"]}
    assert len(as_json["skipped"]) == 5
    assert "the same image, as another class" in reasons["both.png"]
    assert "not a supported image" in reasons["broken.jpg"]
    assert sum("the same image as" in each["reason"] for each in as_json["skipped"]) == 1
    assert sum(as_json["classes"].values()) == 41
    assert as_json["version"] == "2"  # fitting again makes the next version
    assert "fewer than 10 images, so these classes are learnt and measured badly: 'lonely'" in done.err
    assert "compare with --balanced" in done.err
    first, second = (read_checkpoint(store / "pvt_v2_b0.parity" / version / "model.safetensors") for version in "12")
    # But for rounding: how images come together in batches is another each time.
    assert all(torch.allclose(each, second[name], rtol=0, atol=1e-3) for name, each in first.items())


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", BACKBONE], "name the new model with --tag, such as --tag birds for pvt_v2_b0.birds"),
        (["--model", BACKBONE, "--tag", "a b"], "it has letters, digits, '-' and '_'"),
        (["--model", BACKBONE, "--tag", "digits"], "is the backbone itself; choose another --tag"),
        (["--model", BACKBONE, "--add"], "no embeddings lie beside pvt_v2_b0.digits@1"),
        (["--model", BACKBONE, "--add", "--tag", "nothing"], "no model 'pvt_v2_b0.nothing' in the store"),
        (["--model", BACKBONE, "--tag", "one"], "at least two classes; there are images of: 'even'"),
    ],
)
def test_fit_says_in_a_line_what_it_can_not_do(
    pvt_serve: PvtServe, tmp_path: Path, store: Path, arguments: list[str], message: str
) -> None:
    Image.new("L", (64, 64)).save(folder_of(tmp_path / "train", split().train, lambda _: "even", 4) / "even" / "x.png")

    done = pvt_serve("fit", tmp_path / "train", *arguments)

    assert (done.code, message in done.err) == (2, True), done.err
    assert [each.name for each in store.iterdir() if not each.name.startswith(".")] == [BACKBONE]


def test_photos_are_told_apart_by_a_backbone_that_never_saw_any(
    pvt_serve: PvtServe, store: Path, tmp_path: Path
) -> None:
    """Crops of scikit-learn's two photos, from the left half to learn from, from the right half to be asked about."""
    random = np.random.default_rng(0)
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for part, left in (("train", 0), ("test", 320)):
            (folder := tmp_path / part / name).mkdir(parents=True)
            for i in range(40):
                x, y = left + random.integers(0, 160), random.integers(0, 267)
                Image.fromarray(photo[y : y + 160, x : x + 160]).save(folder / f"{i}.jpg")

    fitted = json.loads(pvt_serve("fit", tmp_path / "train", "--model", BACKBONE, "--tag", "photos", "--json").out)
    checked = json.loads(pvt_serve("check", "pvt_v2_b0.photos", tmp_path / "test", "--sample", "0", "--json").out)

    assert fitted["held_out"]["accuracy"] > 0.75
    assert checked["accuracy"] > 0.65  # by chance, of 80 images of two classes, once in 400 times
    card: ModelCard = read_card(store / "pvt_v2_b0.photos" / "1")
    assert (card.labels, card.licence) == (("flower", "temple"), "Apache-2.0")
    assert card.accuracy
    assert card.accuracy.top1 == pytest.approx(fitted["held_out"]["accuracy"], abs=1e-3)
