"""Checkpoints as their own libraries write them, imported and asked over HTTP: they answer as the source model does."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3
from torch.optim.swa_utils import AveragedModel
from transformers import PvtV2Config, PvtV2Model

from service.acquisition.importing import ImportOptions, import_model
from service.acquisition.preprocessing import PreprocessingOptions
from service.architecture.weights import remap_keys
from service.results import Floats
from tests.app.processes import serving
from tests.app.routes import test_answers as answers
from tests.service.acquisition.saved import in_timm, in_transformers, spread_out
from tests.service.architecture.test_checkpoints import in_mmdetection, prefixed

photos = answers.photos
# Writes a model into a folder; returns what to import and what it answers to normalised images.
Written = tuple[Path, Callable[[torch.Tensor], torch.Tensor]]


def fresh(classes: int = 5) -> Any:
    return spread_out(timm.create_model("pvt_v2_b0", num_classes=classes))


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def timms_trainer(folder: Path) -> Written:
    average = ModelEmaV3(model := fresh(), decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    average.update(model, step=10)
    optimizer = torch.optim.AdamW(model.parameters())
    arguments = argparse.Namespace(model="pvt_v2_b0", smoothing=0.1, lr=1e-3)
    CheckpointSaver(model, optimizer, arguments, model_ema=average, checkpoint_dir=str(folder)).save_checkpoint(0, 0.9)
    return folder / "last.pth.tar", average.module.eval()


def the_authors_trainer(folder: Path) -> Written:
    model = fresh()
    content = {"model": remap_keys(model.state_dict()), "epoch": 3, "args": argparse.Namespace(batch_size=128)}
    return saved(content, folder / "checkpoint.pth"), model


def compiled(folder: Path) -> Written:
    model = fresh()
    wrapped: Any = torch.compile(model)
    return saved({"net": wrapped.state_dict(), "acc": 0.9}, folder / "best"), model


def data_parallel_in_bfloat16(folder: Path) -> Written:
    model = fresh().to(torch.bfloat16)
    return saved(torch.nn.DataParallel(model).state_dict(), folder / "best.bin"), model.float()


def averaged(folder: Path) -> Written:
    average = AveragedModel(fresh())
    return saved({"swa_model": average.state_dict()}, folder / "swa.ckpt"), average.module.eval()


def lightnings(folder: Path) -> Written:
    """A head inside a `Sequential` beside a metric, in a module with an attribute's name, as Lightning lays it out."""
    backbone = fresh(0)
    head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(256, 4)).eval()
    state = prefixed("le_tronc.", backbone.state_dict()) | prefixed("classifier.", head.state_dict())
    content = {"state_dict": {**state, "accuracy.total": torch.tensor(3)}, "hyper_parameters": {"lr": 0.1}}
    return saved(content, folder / "epoch=3.ckpt"), torch.nn.Sequential(backbone, head)


def features_only(folder: Path) -> Written:
    model = spread_out(timm.create_model("pvt_v2_b0", features_only=True))
    return saved(model.state_dict(), folder / "trunk.pt"), lambda images: model(images)[-1].mean((2, 3))


def mmdetections(folder: Path) -> Written:
    model = fresh(0)
    state = prefixed("backbone.", in_mmdetection(dict(remap_keys(model.state_dict()))))
    content = {"state_dict": {**state, "neck.conv.weight": torch.ones(8, 256, 1, 1)}, "meta": {"epoch": 12}}
    return saved(content, folder / "epoch_12.pth"), model


def transformers_in_shards(folder: Path) -> Written:
    model = in_transformers(folder, shards=True)
    return folder, lambda images: model(images).logits


def transformers_without_a_head(folder: Path) -> Written:
    model = spread_out(PvtV2Model(PvtV2Config()))
    model.save_pretrained(folder)
    return folder, lambda images: model(images).last_hidden_state.mean((2, 3))


def timms_for_the_hub(folder: Path) -> Written:
    return folder, in_timm(folder)


KINDS = [
    timms_trainer, the_authors_trainer, compiled, data_parallel_in_bfloat16, averaged, lightnings, features_only,
    mmdetections, transformers_in_shards, transformers_without_a_head, timms_for_the_hub,
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, photos: list[bytes]) -> Iterator[tuple[str, Mapping[str, Floats]]]:
    """The service with all of them, and what each source answers."""
    root, truth = tmp_path_factory.mktemp("kinds"), {}
    pixels = PreprocessingOptions(height=answers.SIDE, width=answers.SIDE, crop=1.0)
    images = answers.tensor(photos)
    for kind in KINDS:
        (folder := root / kind.__name__).mkdir()
        file, model = kind(folder)
        with torch.inference_mode():
            truth[kind.__name__] = model(images).numpy()
        import_model(root / "store", ImportOptions(file=file, tag=kind.__name__, preprocessing=pixels))
    with serving(
        read_log=False, model_store=str(root / "store"), default_model=f"pvt_v2_b0.{KINDS[0].__name__}",
        backend="torch", instances="1", max_batch_size="1", precision="float32",
    ) as server:  # fmt: skip
        yield server.url, truth


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile uses it
@pytest.mark.parametrize("kind", [kind.__name__ for kind in KINDS])
def test_it_answers_as_the_source_does(
    served: tuple[str, Mapping[str, Floats]], photos: list[bytes], kind: str
) -> None:
    (url, truth), files = served, [("image", photo) for photo in photos]
    wanted = truth[kind]
    model = httpx.get(f"{url}/models/pvt_v2_b0.{kind}").json()

    if model["num_classes"] == 0:
        results = httpx.post(f"{url}/features", params={"model": model["id"]}, files=files, timeout=60).json()[
            "results"
        ]
        np.testing.assert_allclose([each["embedding"] for each in results], wanted, rtol=1e-3, atol=1e-4)
        return
    query = {"model": model["id"], "top_k": model["num_classes"]}
    results = httpx.post(f"{url}/predict", params=query, files=files, timeout=60).json()["results"]
    found = [
        [score for _, score in sorted((p["class_id"], p["score"]) for p in each["predictions"])] for each in results
    ]
    np.testing.assert_allclose(found, torch.from_numpy(wanted).softmax(1).numpy(), rtol=1e-3, atol=1e-4)
