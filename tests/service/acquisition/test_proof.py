"""What a checkpoint itself answers is what its own library's module does, and a conversion that goes wrong shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from service.acquisition.importing import ImportOptions, import_model
from service.acquisition.preprocessing import PreprocessingOptions
from service.acquisition.proof import own_logits
from service.architecture import checkpoints, dialects, weights
from service.architecture.variants import VARIANTS, Dialect
from service.errors import WeightsMismatch
from service.store.store import Store
from tests.service.acquisition.saved import in_timm, in_transformers, spread_out
from tests.service.architecture.test_checkpoints import in_mmdetection, prefixed
from tests.service.architecture.test_weights import in_lucid

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = np.random.default_rng(3).integers(0, 256, (2, 64, 96, 3), np.uint8)
PIXELS = torch.from_numpy((IMAGES / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def of_timm(variant: str) -> Any:
    return spread_out(timm.create_model(variant, num_classes=5))


def own(state: dict[str, Tensor], dialect: Dialect, variant: str) -> np.ndarray:
    return own_logits(state, dialect, VARIANTS[variant], IMAGES, mean=MEAN, std=STD)


@pytest.mark.parametrize("variant", ["pvt_v2_b0", "pvt_v2_b2_li", "pvt_v2_b5"])
def test_it_is_what_timm_answers_in_double_precision(variant: str) -> None:
    theirs = of_timm(variant)
    state = theirs.state_dict()
    with torch.inference_mode():
        wanted = theirs.double()(PIXELS).numpy()

    np.testing.assert_allclose(own(state, "timm", variant), wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("variant", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_it_is_what_transformers_answers_in_double_precision(tmp_path: Path, variant: str) -> None:
    theirs = in_transformers(tmp_path, variant=variant)
    state = theirs.state_dict()
    with torch.inference_mode():
        wanted = theirs.double()(PIXELS).logits.numpy()

    np.testing.assert_allclose(own(state, "transformers", variant), wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("variant", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_the_names_of_lucid_and_of_the_authors_give_the_same(variant: str) -> None:
    state = dict(of_timm(variant).state_dict())
    wanted = own(state, "timm", variant)
    theirs = weights.remap_keys(state)

    assert np.array_equal(own(theirs, "official", variant), wanted)
    assert np.array_equal(own(in_lucid(theirs), "lucid", variant), wanted)


def swapped(one: str, other: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The conversion, but for two names that it takes for each other."""
    convert = dialects.joined

    def wrong(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        fine = convert(parts)
        return {**fine, one: fine[other], other: fine[one]}

    return wrong


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("block1.0.norm1.weight", "block1.0.norm2.weight"),
        ("block2.1.attn.q.weight", "block2.1.attn.proj.weight"),
        ("block4.0.norm1.bias", "norm4.bias"),
    ],
)
@pytest.mark.parametrize("save", [in_timm, in_transformers])
def test_tensors_of_one_shape_in_each_others_place_are_noticed_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[Path], object], one: str, other: str
) -> None:
    save(tmp_path / "hub")
    (root := tmp_path / "store").mkdir()
    monkeypatch.setattr(checkpoints, "joined", swapped(one, other))
    small = PreprocessingOptions(height=32, width=32)

    with pytest.raises(WeightsMismatch, match="does not answer as the checkpoint itself does: logits are off by"):
        import_model(root, ImportOptions(file=tmp_path / "hub", tag="birds", preprocessing=small))
    assert Store(root).models() == []
    assert [path.name for path in root.rglob("*") if path.is_file()] == []


def only_features(variant: str) -> dict[str, Tensor]:
    return dict(spread_out(timm.create_model(variant, features_only=True)).state_dict())


@pytest.mark.parametrize(
    ("content", "dialect"),
    [
        (lambda: {"state_dict": prefixed("backbone.", in_mmdetection(headless()))}, "mmdetection"),
        (lambda: {"model": prefixed("module.", only_features("pvt_v2_b0"))}, "timm"),
        (lambda: {"net": prefixed("model.", {**headless(), "fc.weight": torch.randn(4, 256)})}, "official"),
        (lambda: {"ema": in_lucid(weights.remap_keys(of_timm("pvt_v2_b0").state_dict()))}, "lucid"),
    ],
)
def test_what_trainers_wrap_is_proved_under_its_own_names(
    tmp_path: Path, content: Callable[[], object], dialect: str
) -> None:
    torch.save(content(), tmp_path / "last.ckpt")
    (root := tmp_path / "store").mkdir()
    notes: list[str] = []
    small = PreprocessingOptions(height=32, width=32)

    import_model(root, ImportOptions(file=tmp_path / "last.ckpt", tag="mine", preprocessing=small), notes.append)

    (proof,) = [note for note in notes if note.startswith("proof")]
    assert proof.endswith(f"under their names in {dialect}")


def headless() -> dict[str, Tensor]:
    state = weights.remap_keys(of_timm("pvt_v2_b0").state_dict())
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
