"""Checkpoints of every dialect, and every way in which a file can be wrong."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PvtV2Backbone, PvtV2Config, PvtV2ForImageClassification

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.variants import VARIANTS
from service.architecture.weights import load_into, load_weights, read_checkpoint, remap_keys
from service.errors import (
    WeightsCorrupt,
    WeightsDigestMismatch,
    WeightsInvalid,
    WeightsMismatch,
    WeightsNotFinite,
    WeightsUnavailable,
    WeightsUnsafe,
)
from service.files import file_sha256

State = dict[str, Tensor]


def model_of(variant: str = "pvt_v2_b0") -> PVT_V2:
    """A small model of the variant's kind, all of whose tensors are random."""
    model = create(variant, num_classes=10, depths=(1, 2, 1, 1), embed_dims=(8, 16, 40, 64))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def model() -> PVT_V2:
    return model_of()


def in_timm(state: State) -> State:
    """The names of timm's `PyramidVisionTransformerV2`, read off its source: submodules and nesting."""
    stems = {"patch_embed1": "patch_embed"}
    for i in range(4):
        stems |= {f"block{i + 1}": f"stages.{i}.blocks", f"norm{i + 1}": f"stages.{i}.norm"}
        if i:
            stems[f"patch_embed{i + 1}"] = f"stages.{i}.downsample"
    renamed = {}
    for name, tensor in state.items():
        stem, rest = name.split(".", 1)
        renamed[f"{stems.get(stem, stem)}.{rest.replace('dwconv.dwconv', 'dwconv')}"] = tensor
    return renamed


def in_lucid(state: State) -> State:
    return {name.replace("head.", "classifier."): tensor for name, tensor in in_timm(state).items()}


def in_ddp(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def unchanged(state: State) -> State:
    return dict(state)


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dialect", [unchanged, in_timm, in_lucid, in_ddp])
@pytest.mark.parametrize("variant", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_dialect_round_trip(tmp_path: Path, variant: str, dialect: Callable[[State], State], suffix: str) -> None:
    model = model_of(variant)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(dialect(model.state_dict()), path)
    fresh = create(variant, num_classes=10, depths=(1, 2, 1, 1), embed_dims=(8, 16, 40, 64))

    load_weights(fresh, path, file_sha256(path))

    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("variant", ["pvt_v2_b0", "pvt_v2_b2_li"])
@pytest.mark.parametrize("kind", [PvtV2ForImageClassification, PvtV2Backbone])
def test_transformers_own_state_dict_is_understood(variant: str, kind: type[Any]) -> None:
    row = VARIANTS[variant]
    config = PvtV2Config.from_dict(
        {
            "hidden_sizes": row.embed_dims,
            "depths": row.depths,
            "linear_attention": row.linear,
            "num_labels": 10,
            "out_features": ["stage4"],
        }
    )
    reference = kind(config).state_dict()
    with torch.device("meta"):
        wanted = create(variant, num_classes=10 if kind is PvtV2ForImageClassification else 0).state_dict()

    state = remap_keys(reference)

    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in wanted.items()}
    prefix = "pvt_v2." if kind is PvtV2ForImageClassification else ""
    attention = f"{prefix}encoder.layers.2.blocks.1.attention."
    key, value = reference[f"{attention}key.weight"], reference[f"{attention}value.weight"]
    assert torch.equal(state["block3.1.attn.kv.weight"], torch.cat([key, value]))
    assert torch.equal(state["block3.1.attn.sr.weight"], reference[f"{attention}spatial_reduction.weight"])
    mlp = f"{prefix}encoder.layers.0.blocks.0.mlp."
    assert torch.equal(state["block1.0.mlp.fc1.weight"], reference[f"{mlp}dense1.weight"])
    assert torch.equal(state["block1.0.mlp.fc2.weight"], reference[f"{mlp}dense2.weight"])


def test_official_names_come_back_as_they_are(model: PVT_V2) -> None:
    state = model.state_dict()

    assert_same(remap_keys(state), dict(state))


def test_mixed_dialects_are_refused(model: PVT_V2, tmp_path: Path) -> None:
    path = tmp_path / "mixed.pth"
    torch.save({**model.state_dict(), "classifier.weight": torch.ones(10, 64)}, path)

    with pytest.raises(WeightsMismatch, match=r"mixed\.pth.*head\.weight"):
        read_checkpoint(path)


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_nested_state_dict_is_found(model: PVT_V2, tmp_path: Path, wrapper: str) -> None:
    path = tmp_path / "nested.pth"
    torch.save({"epoch": 3, wrapper: in_ddp(in_timm(model.state_dict()))}, path)

    assert_same(read_checkpoint(path), dict(model.state_dict()))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(model: PVT_V2, tmp_path: Path, kind: torch.dtype) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: tensor.to(kind) for name, tensor in model.state_dict().items()}, path)

    state = read_checkpoint(path)

    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert_same(state, {name: tensor.to(kind).float() for name, tensor in model.state_dict().items()})


def test_meta_model_takes_the_tensors_themselves(model: PVT_V2) -> None:
    with torch.device("meta"):
        empty = create("pvt_v2_b0", num_classes=10, depths=(1, 2, 1, 1), embed_dims=(8, 16, 40, 64))
    state = model.state_dict()

    load_into(empty, state)

    assert empty.state_dict()["head.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert not any(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_file_is_corrupt(model: PVT_V2, tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])

    with pytest.raises(WeightsCorrupt, match=re.escape(str(path))):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["noise.safetensors", "noise.pth", "noise.bin"])
def test_noise_is_corrupt(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(hashlib.sha512(b"noise").digest() * 100)

    with pytest.raises(WeightsCorrupt, match=re.escape(name)):
        read_checkpoint(path)


def test_a_format_is_told_by_content(model: PVT_V2, tmp_path: Path) -> None:
    pth, safe, bare = tmp_path / "is_safetensors.pth", tmp_path / "is_pickle.safetensors", tmp_path / "bare"
    save_file(model.state_dict(), pth)
    torch.save(model.state_dict(), safe)
    torch.save(model.state_dict(), bare, _use_new_zipfile_serialization=False)

    for path in (pth, safe, bare):
        assert_same(read_checkpoint(path), dict(model.state_dict()))


def test_missing_file_and_folder_are_unavailable(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"none\.pth"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(WeightsUnavailable):
        read_checkpoint(tmp_path)


def test_wrong_digest_gives_both_before_anything_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "any.pth"
    path.write_bytes(b"not even a checkpoint")

    with pytest.raises(WeightsDigestMismatch, match=f"{file_sha256(path)}.*{'0' * 64}"):
        read_checkpoint(path, sha256="0" * 64)


class Malicious:
    """Unpickled, it would create the folder it was given."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"mkdir {self.witness}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    path, witness = tmp_path / "bad.pth", tmp_path / "ran"
    torch.save({"head.weight": Malicious(witness)}, path, _use_new_zipfile_serialization=not legacy)

    with pytest.raises(WeightsUnsafe, match=r"bad\.pth"):
        read_checkpoint(path)

    assert not witness.exists()


def test_whole_pickled_model_is_unsafe(model: PVT_V2, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(model, path)

    with pytest.raises(WeightsUnsafe):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": {}},
        [torch.ones(1)],
        {"head.weight": torch.ones(2, dtype=torch.int64)},
        {"head.weight": torch.ones(2, dtype=torch.complex64)},
        {"head.weight": [1.0]},
        {"head.weight": torch.ones(1).expand(1_000_000)},
        {"head.weight": torch.ones(2, device="meta")},
    ],
)
def test_content_other_than_float_tensors_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "odd.pth"
    torch.save(content, path)

    with pytest.raises(WeightsCorrupt, match=r"odd\.pth"):
        read_checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite_is_refused_with_its_tensor(model: PVT_V2, tmp_path: Path, value: float) -> None:
    path = tmp_path / "model.safetensors"
    state = model.state_dict()
    state["norm2.weight"][3] = value
    save_file(state, path)

    with pytest.raises(WeightsNotFinite, match=r"model\.safetensors: norm2\.weight"):
        load_weights(model, path)


def test_mismatch_lists_what_is_missing_unexpected_and_misshapen(model: PVT_V2) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items() if not name.startswith("norm4")}
    state |= {"extra": torch.ones(1), "head.weight": torch.ones(1000, 64)}

    with pytest.raises(WeightsMismatch) as caught:
        load_into(model, state, source="a.pth")

    message = str(caught.value)
    assert "a.pth" in message
    assert "2 missing: norm4.weight, norm4.bias;" in message
    assert "1 unexpected: extra;" in message
    assert "1 misshapen: head.weight (1000, 64) for (10, 64);" in message
    assert_same(dict(model.state_dict()), before)


def test_long_lists_are_capped_with_a_count(model: PVT_V2) -> None:
    with pytest.raises(WeightsMismatch, match=r"99 unexpected: x0, .*x7 and 91 more"):
        load_into(model, {**model.state_dict(), **{f"x{i}": torch.ones(1) for i in range(99)}})


def test_half_of_a_split_pair_is_unexpected() -> None:
    state = remap_keys({"encoder.layers.0.blocks.0.attention.key.weight": torch.ones(2, 2)})

    assert list(state) == ["block1.0.attn.key.weight"]


def test_every_error_about_a_file_is_one_of_weights() -> None:
    for error in (WeightsCorrupt, WeightsDigestMismatch, WeightsMismatch, WeightsNotFinite, WeightsUnsafe):
        assert issubclass(error, WeightsInvalid)
