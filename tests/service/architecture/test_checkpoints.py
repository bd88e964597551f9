"""Checkpoints as trainers write them: containers, prefixes, dialects, averages, heads, and what is refused."""

import argparse
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import PvtV2Config, PvtV2ForImageClassification

from service.architecture.pvt_v2 import create
from service.architecture.variants import VARIANTS
from service.architecture.weights import checkpoint_of, open_checkpoint
from service.errors import WeightsCorrupt, WeightsMismatch, WeightsUnsafe
from tests.service.architecture.test_weights import Malicious, assert_same, in_lucid, in_timm, unchanged
from tests.service.checkpoints import official

State = dict[str, Tensor]


def weights(classes: int = 3) -> State:
    return dict(official(classes))


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def in_mmdetection(state: State) -> State:
    """The names of mmdetection's `PyramidVisionTransformerV2`, as its converter makes them."""
    names = {"mlp.fc1": "ffn.layers.0", "mlp.dwconv.dwconv": "ffn.layers.1", "mlp.fc2": "ffn.layers.4"}
    names |= {"attn.proj": "attn.attn.out_proj"}
    made = {}
    for name, tensor in state.items():
        site, _, rest = name.partition(".")
        stage = int(site[-1]) - 1 if site[-1].isdigit() else 0
        if site.startswith("patch_embed"):
            made[f"layers.{stage}.0.{rest.replace('proj', 'projection')}"] = tensor
        elif site.startswith("norm"):
            made[f"layers.{stage}.2.{rest}"] = tensor
        elif ".attn.q." in name:
            joined = torch.cat([tensor, state[name.replace(".q.", ".kv.")]])
            made[f"layers.{stage}.1.{rest.replace('attn.q.', 'attn.attn.in_proj_')}"] = joined
        elif site.startswith("block") and ".attn.kv." not in name:
            layer, kind = rest.split(".", 1)[1].rsplit(".", 1)
            shaped = tensor[..., None, None] if ".fc" in name and tensor.ndim == 2 else tensor
            made[f"layers.{stage}.1.{rest.split('.')[0]}.{names.get(layer, layer)}.{kind}"] = shaped
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_found_by_its_shapes(variant: str) -> None:
    with torch.device("meta"):
        state = dict(create(variant, num_classes=5).state_dict())

    found = checkpoint_of(state, "a.pth")

    assert (found.variant, found.dialect, found.head, found.left_aside) == (variant, "official", "head", ())


@pytest.mark.parametrize("container", [(), ("model",), ("state_dict",), ("net",), ("anything", "network")])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.module.", "model.backbone.", "my_net.", "a.module.b._orig_mod."]
)
@pytest.mark.parametrize("dialect", [unchanged, in_timm, in_lucid])
def test_containers_prefixes_and_dialects(
    container: tuple[str, ...], prefix: str, dialect: Callable[[State], State]
) -> None:
    content: object = prefixed(prefix, dialect(weights()))
    for name in container:
        content = {name: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}

    found = checkpoint_of(content, "a.pth")

    assert_same(found.state, weights())
    assert found.dialect == {"unchanged": "official", "in_timm": "timm", "in_lucid": "lucid"}[dialect.__name__]
    assert (found.variant, found.weights, found.note) == ("pvt_v2_b0", "plain", None)
    optimizers = [".".join([*container[:0:-1][:i], "optimizer.state.0.exp_avg"]) for i in range(len(container))]
    assert sorted(found.left_aside) == sorted(optimizers)


def test_a_prefix_on_some_of_the_names_only() -> None:
    state = weights() | {"head.bias": torch.tensor([1.0, 2.0, 3.0])}

    found = checkpoint_of({("net." if i % 2 else "") + name: state[name] for i, name in enumerate(state)}, "a.pth")

    assert_same(found.state, state)


def test_transformers_and_mmdetection() -> None:
    config = PvtV2Config.from_dict({"hidden_sizes": (32, 64, 160, 256), "depths": (2, 2, 2, 2), "num_labels": 3})
    theirs = PvtV2ForImageClassification(config).state_dict()
    state = weights()
    backbone = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    mm = checkpoint_of(
        {"state_dict": {**prefixed("backbone.", in_mmdetection(state)), "neck.conv.weight": torch.ones(8, 256, 1, 1)}},
        "mm",
    )

    found = checkpoint_of(theirs, "hf")

    assert (found.dialect, found.head, found.variant) == ("transformers", "classifier", "pvt_v2_b0")
    assert torch.equal(found.state["head.weight"], theirs["classifier.weight"])
    assert (mm.dialect, mm.head, mm.left_aside) == ("mmdetection", None, ("state_dict.neck.conv.weight",))
    assert_same(mm.state, backbone)


def test_timms_features_only_names_are_headless() -> None:
    theirs = timm.create_model("pvt_v2_b0", features_only=True)

    found = checkpoint_of(theirs.state_dict(), "a.pth")

    assert (found.dialect, found.variant, found.head) == ("timm", "pvt_v2_b0", None)
    assert not any(name.startswith("head") for name in found.state)


@pytest.mark.parametrize("name", ["head.1", "classifier.0", "fc", "head.fc", "cls_layer"])
def test_one_linear_layer_of_any_name_is_the_head(name: str) -> None:
    state = weights()
    named = {n.replace("head.", f"{name}.") if n.startswith("head.") else f"body.{n}": t for n, t in state.items()}
    named |= {"train_acc.total": torch.tensor(3), "aux_head.weight": torch.ones(3, 256), "loss.weight": torch.ones(3)}

    found = checkpoint_of(named, "a.pth")

    assert_same(found.state, state)
    assert found.head == name
    assert found.left_aside == ("train_acc.total", "aux_head.weight", "loss.weight")


def test_a_head_of_more_layers_is_refused_by_name_unless_a_backbone_is_wanted() -> None:
    state = {name: tensor for name, tensor in weights().items() if not name.startswith("head.")}
    named = state | {"head.0.weight": torch.ones(64, 256), "head.2.weight": torch.ones(3, 64)}

    with pytest.raises(WeightsMismatch, match=r"not one linear layer but head\.0, head\.2"):
        checkpoint_of(named, "a.pth")
    assert_same(checkpoint_of(named, "a.pth", backbone=True).state, state)


@pytest.mark.parametrize("name", ["block1.0.ls1.gamma", "block1.0.attn.q.lora_A.weight", "norm4.running_mean"])
def test_weights_inside_the_backbone_that_are_not_pvt_v2s_are_refused(name: str) -> None:
    with pytest.raises(WeightsMismatch, match=f"PVT-v2 has not: {name}"):
        checkpoint_of(weights() | {name: torch.ones(4, 32)}, "a.pth")


@pytest.mark.parametrize("extra", ["bottleneck.weight", "neck.bn.weight", "bn.weight"])
def test_a_layer_between_embedding_and_head_is_refused(extra: str) -> None:
    with pytest.raises(WeightsMismatch, match="not one linear layer but"):
        checkpoint_of(weights() | {extra: torch.ones(256)}, "a.pth")


def test_averages_are_taken_unless_plain_weights_are_requested() -> None:
    plain, average = weights(), {name: tensor + 1 for name, tensor in weights().items()}
    layouts = [
        {"state_dict": plain, "state_dict_ema": average},
        {"ema": {**prefixed("online_model.", plain), **prefixed("ema_model.", average), "initted": torch.tensor(1)}},
        {"state_dict": average, "ema_state_dict": {"steps": torch.tensor(3), **prefixed("module.", plain)}},
    ]
    for content in layouts:
        found = checkpoint_of(content, "a.pth")

        assert (found.weights, found.note is not None) == ("ema", True)
        assert_same(found.state, average)
        assert_same(checkpoint_of(content, "a.pth", weights="plain").state, plain)


def test_torchs_averaged_model() -> None:
    model = create("pvt_v2_b0", num_classes=3)
    averaged = AveragedModel(model)

    found = checkpoint_of({"swa_model": averaged.state_dict()}, "a.pth")

    assert_same(found.state, dict(model.state_dict()))
    assert found.left_aside == ("swa_model.n_averaged",)


def test_two_models_in_one_file_are_refused() -> None:
    other = {name: tensor + 1 for name, tensor in weights().items()}

    with pytest.raises(WeightsMismatch, match=r"several models .'a', 'b'."):
        checkpoint_of({"a": weights(), "b": other}, "x.pth")


def test_other_architectures_are_told_by_their_names() -> None:
    with pytest.raises(WeightsMismatch, match=r"no PVT-v2 .*conv1\.weight"):
        checkpoint_of(timm.create_model("resnet18").state_dict(), "x.pth")
    with pytest.raises(WeightsMismatch, match=r"no PVT-v2 .*cls_token"):
        checkpoint_of(timm.create_model("vit_tiny_patch16_224").state_dict(), "x.pth")


def test_near_variants_are_named_with_what_differs() -> None:
    state = weights() | {"patch_embed1.proj.weight": torch.ones(32, 1, 7, 7)}

    with pytest.raises(WeightsMismatch, match=r"pvt_v2_b0 differs in patch_embed1\.proj\.weight \(32, 1, 7, 7\)"):
        checkpoint_of(state, "x.pth")


def test_what_trainers_save_beside_weights_is_read_as_data(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=0.1, out=Path("/runs"))
    torch.save(
        {"model": weights(), "args": args, "best": np.float64(0.8), "log": np.ones(3)}, tmp_path / "best.pth.tar"
    )

    assert_same(open_checkpoint(tmp_path / "best.pth.tar").state, weights())


def test_nothing_in_a_pickle_runs_and_the_class_is_named(tmp_path: Path) -> None:
    torch.save({"model": weights(), "args": Malicious(tmp_path / "ran")}, tmp_path / "bad")
    hidden = argparse.Namespace(inner=Malicious(tmp_path / "ran"))
    torch.save({"model": weights(), "args": hidden}, tmp_path / "hidden")
    torch.save(timm.create_model("pvt_v2_b0"), tmp_path / "whole")

    for name, refused in (("bad", "system"), ("hidden", "system"), ("whole", "PyramidVisionTransformerV2")):
        with pytest.raises(WeightsUnsafe, match=refused):
            open_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))

    with pytest.raises(WeightsCorrupt, match="unpacks to 50000000"):
        open_checkpoint(tmp_path / "bomb.pth")
