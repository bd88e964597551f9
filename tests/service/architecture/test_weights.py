"""Checkpoints of every dialect, and every way in which a file can be wrong."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PvtV2Backbone, PvtV2Config, PvtV2ForImageClassification

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.variants import VARIANTS
from service.architecture.weights import load_into, load_weights, read_checkpoint, read_state_file, remap_keys
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


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def named(value: float) -> dict[str, Tensor]:
    return {"head.weight": torch.full((2, 3), value), "head.bias": torch.full((2,), value)}


PLAIN, EMA = named(1.0), named(2.0)
AVERAGED_MODEL = {"n_averaged": torch.tensor(7), **{f"module.{name}": tensor for name, tensor in EMA.items()}}
BOTH: dict[str, dict[str, object]] = {
    "timm": {"state_dict": PLAIN, "state_dict_ema": EMA, "epoch": 3},
    "the authors' main.py": {"model": PLAIN, "model_ema": EMA, "optimizer": {"state": {}}},
    "short": {"model": PLAIN, "ema": EMA},
    "nested": {"model": PLAIN, "ema": {"decay": 0.999, "module": EMA}},
    "shadow": {"state_dict": PLAIN, "ema": {"shadow": EMA, "num_updates": 3}},
    "within": {"model": {"state_dict": PLAIN, "state_dict_ema": EMA}},
    "torch": {"state_dict": PLAIN, "swa_model": AVERAGED_MODEL},
    "beside": {"state_dict": PLAIN, "ema_state_dict": EMA},
    "mmengine, which swaps them": {
        "state_dict": EMA,
        "ema_state_dict": {"steps": torch.tensor(3), **{f"module.{n}": t for n, t in PLAIN.items()}},
    },
    "camel case": {"model": PLAIN, "modelEMA": EMA},
    "camel case, turned": {"model": PLAIN, "emaModel": EMA},
    "plural": {"model": PLAIN, "moving_averages": EMA},
    "shadow beside": {"model": PLAIN, "shadow": EMA},
    "by decay": {"state_dict": PLAIN, "EMA-0.9999": EMA},
}


@pytest.mark.parametrize("layout", BOTH)
def test_ema_weights_are_taken_unless_the_plain_ones_are_requested(tmp_path: Path, layout: str) -> None:
    path = written(tmp_path / "both.pth", BOTH[layout])

    found = read_state_file(path)

    assert (found.weights, found.dialect) == ("ema", "official")
    assert found.note.startswith("EMA weights (")
    assert "--weights plain" in found.note
    assert_same(found.state, EMA)
    assert_same(read_state_file(path, weights="ema").state, EMA)
    plain = read_state_file(path, weights="plain")
    assert_same(plain.state, PLAIN)
    assert "left aside" in plain.note


@pytest.mark.parametrize(
    "content",
    [PLAIN, {"model": PLAIN}, {"state_dict": PLAIN, "state_dict_ema": None}, {"model": PLAIN, "model_ema": {}},
     {"model": PLAIN, "ema_decay": 0.99, "avg_metrics": {"top1": 0.8}},
     {"model": PLAIN, "avg_metrics": {"loss": torch.tensor(0.1)}, "ema_losses": [torch.tensor(0.1), 0.2]},
     {"model": PLAIN, "ema": {"losses": [0.1, 0.2]}}, {**PLAIN, "n_averaged": torch.tensor(7)}],
)  # fmt: skip
def test_plain_weights_alone_are_taken_without_a_word(tmp_path: Path, content: object) -> None:
    path = written(tmp_path / "plain.pth", content)

    found = read_state_file(path)

    assert (found.weights, found.note) == ("plain", "")
    assert_same(found.state, PLAIN)
    with pytest.raises(WeightsMismatch, match="no EMA weights"):
        read_state_file(path, weights="ema")


def test_ema_weights_alone_are_taken_and_plain_ones_are_not_made_up(tmp_path: Path) -> None:
    path = written(tmp_path / "ema.pth", {"state_dict_ema": EMA, "epoch": 3})

    assert_same(read_state_file(path).state, EMA)
    assert "plain" not in read_state_file(path).note
    with pytest.raises(WeightsMismatch, match="only EMA weights"):
        read_state_file(path, weights="plain")


@pytest.mark.parametrize(
    ("averages", "message"),
    [
        ({"ema_0.99": EMA, "ema_0.9999": EMA}, "several EMA weights .'ema_0.99', 'ema_0.9999'."),
        ({"ema": {"shadow_params": [*EMA.values()], "decay": 0.9}}, "a list without names"),
        ({"shadow_params": [*EMA.values()]}, "a list without names"),
        ({"ema_params": tuple(EMA.values())}, "a list without names"),
    ],
)
def test_ema_weights_that_are_not_clear_are_refused_and_plain_ones_can_be_had(
    tmp_path: Path, averages: dict[str, object], message: str
) -> None:
    path = written(tmp_path / "unclear.pth", {"model": PLAIN, **averages})

    with pytest.raises(WeightsMismatch, match=message):
        read_state_file(path)
    assert_same(read_state_file(path, weights="plain").state, PLAIN)


def test_timm_loads_the_same_of_what_it_writes(tmp_path: Path) -> None:
    path = written(tmp_path / "timm.pth", BOTH["timm"])

    assert_same(read_state_file(path).state, timm.models.load_state_dict(str(path), use_ema=True))
    assert_same(read_state_file(path, weights="plain").state, timm.models.load_state_dict(str(path), use_ema=False))


@pytest.mark.parametrize("name", ["model", "ema"])
def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path, name: str) -> None:
    content: dict[str, object] = {"model": {}}
    content[name] = {"model": content, "module": content}

    with pytest.raises(WeightsCorrupt):
        read_state_file(written(tmp_path / "loop.pth", content))
