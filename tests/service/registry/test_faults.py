"""Every way in which a model's files can be wrong: each is reported as what it is, and harms no other model."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file, save_file

from service import errors
from service.architecture.pvt_v2 import create
from service.engine import Engine
from service.errors import ServiceError
from service.execution.reference import Reference, packed, synthetic_images
from service.metrics import EngineMetrics
from service.options import EngineOptions
from tests.app.conftest import png
from tests.service.architecture.test_weights import Malicious
from tests.service.stores import add_model

GOOD = "pvt_v2_b0.good"
WITNESS = "code_ran"


def edit(folder: Path, **fields: Any) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | fields))


def replace(folder: Path, data: bytes, name: str = "model.safetensors") -> None:
    """Other weights, with a card that speaks of them."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(folder, weights={"file": name, "sha256": digest, "bytes": len(data)})


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "new")
    data = (folder / "new").read_bytes()
    (folder / "new").unlink()
    replace(folder, data)


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def truncated_with_its_card(folder: Path) -> None:
    replace(folder, (folder / "model.safetensors").read_bytes()[:1_000_000])


def emptied_with_its_card(folder: Path) -> None:
    replace(folder, b"{}")


def bit_flipped(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "model.safetensors").write_bytes(data)


def of_another_model(folder: Path) -> None:
    """Of the same variant and size, so that only the digest shows it."""
    torch.manual_seed(7)
    save_file(create("pvt_v2_b0", num_classes=3).state_dict(), folder / "model.safetensors")


def of_another_model_with_its_card(folder: Path) -> None:
    """As if two folders' weights and digests were swapped: only the reference logits show it."""
    random = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    data, file = packed(Reference(synthetic_images(32, 32), random))
    (folder / file.file).write_bytes(data)
    edit(folder, reference=file.model_dump())


def of_another_variant(folder: Path) -> None:
    def wider(state: dict[str, torch.Tensor]) -> None:
        state["patch_embed1.proj.weight"] = torch.zeros(64, 3, 7, 7)
        del state["norm1.bias"]

    rewrite(folder, wider)


def nan_laden(folder: Path) -> None:
    def fill(state: dict[str, torch.Tensor]) -> None:
        state["block2.0.attn.q.weight"].fill_(float("nan"))

    rewrite(folder, fill)


def pickled_code(folder: Path) -> None:
    path = folder / "bad.pth"
    torch.save({"head.weight": Malicious(folder.parent.parent / WITNESS)}, path)
    replace(folder, path.read_bytes(), "bad.pth")


def reference_of_another_shape(folder: Path) -> None:
    data, file = packed(Reference(synthetic_images(64, 64), np.zeros((4, 3), np.float32)))
    (folder / file.file).write_bytes(data)
    edit(folder, reference=file.model_dump())


def reference_not_a_number(folder: Path) -> None:
    data, file = packed(Reference(synthetic_images(32, 32), np.full((4, 3), np.nan, np.float32)))
    (folder / file.file).write_bytes(data)
    edit(folder, reference=file.model_dump())


def card_with(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **fields)


def card_larger_than_any(folder: Path) -> None:
    with (folder / "card.json").open("ab") as file:
        file.truncate(100_000_000)


SIZE = {"height": 32, "width": 32}
FAULTS: dict[str, tuple[Callable[[Path], None], type[ServiceError], str]] = {
    "truncated": (truncated, errors.WeightsCorrupt, "1000 bytes, the card says"),
    "cut": (truncated_with_its_card, errors.WeightsCorrupt, "truncated, or neither"),
    "empty": (emptied_with_its_card, errors.WeightsCorrupt, "truncated, or neither"),
    "flipped": (bit_flipped, errors.WeightsDigestMismatch, "SHA-256 is"),
    "swapped": (of_another_model, errors.WeightsDigestMismatch, "SHA-256 is"),
    "swapped-card": (of_another_model_with_its_card, errors.ReferenceInvalid, "logits are off by"),
    "variant": (of_another_variant, errors.WeightsMismatch, "1 missing: norm1.bias; 1 misshapen: patch_embed1.proj"),
    "nan": (nan_laden, errors.WeightsNotFinite, "block2.0.attn.q.weight holds NaN"),
    "code": (pickled_code, errors.WeightsUnsafe, "the pickle asks for"),
    "ref-shape": (reference_of_another_shape, errors.ReferenceInvalid, "must be uint8"),
    "ref-nan": (reference_not_a_number, errors.ReferenceInvalid, "NaN or infinity"),
    "newer-format": (card_with(format=99), errors.CardInvalid, "format 99"),
    "unknown-resize": (card_with(preprocessing={**SIZE, "resize": "tile"}), errors.CardInvalid, "preprocessing.resize"),
    "classes": (card_with(labels=["a", "b"]), errors.WeightsMismatch, "head.weight (3, 256) for (2, 256)"),
    "mean": (card_with(preprocessing={**SIZE, "mean": [0.5, 0.5]}), errors.CardInvalid, "preprocessing.mean"),
    "std": (card_with(preprocessing={**SIZE, "std": [0.5, 0.0, 1]}), errors.CardInvalid, "preprocessing.std.1"),
    "size": (card_with(preprocessing={"height": 10**9, "width": 32}), errors.CardInvalid, "less than or equal to 4096"),
    "huge": (card_larger_than_any, errors.CardInvalid, "larger than"),
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Path:
    good = add_model(tmp_path, GOOD)
    for name, (harm, _, _) in FAULTS.items():
        folder = tmp_path / f"pvt_v2_b0.{name}" / "1"
        shutil.copytree(good, folder)
        edit(folder, id=f"pvt_v2_b0.{name}")
        harm(folder)
    return tmp_path


async def test_a_model_whose_files_are_wrong_says_how_and_every_other_goes_on(store: Path) -> None:
    options = EngineOptions(model_store=store, default_model=GOOD, backend="torch", instances=1, max_batch_size=1)
    reported: dict[str, tuple[str, bool]] = {}
    async with Engine(options, EngineMetrics(CollectorRegistry())) as engine:
        for name, (_, _, words) in FAULTS.items():
            with pytest.raises(ServiceError) as caught:
                await engine.infer([png()], model=f"pvt_v2_b0.{name}")
            reported[name] = type(caught.value).__name__, words in str(caught.value)
            assert (await engine.infer([png()])).model == GOOD
        statuses = {each.id: each for each in await engine.models()}

    assert reported == {name: (kind.__name__, True) for name, (_, kind, _) in FAULTS.items()}
    reasons = {id_: str(each.failure or "") for id_, each in statuses.items()}
    assert reasons.pop(GOOD) == ""
    assert [id_ for id_, reason in reasons.items() if FAULTS[id_.partition(".")[2]][2] not in reason] == []
    assert not (store / WITNESS).exists()
