"""Checkpoints as trainers write them: containers, prefixes, dialects, averages, heads, and what is refused."""

import argparse
import pickle
import sys
import types
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_several_heads_are_told_as_such() -> None:
    two = {"color.weight": torch.ones(2, 256), "kind.weight": torch.ones(3, 256)}
    with pytest.raises(WeightsMismatch, match="several heads, color, kind"):
        checkpoint_of({name: t for name, t in weights().items() if "head" not in name} | two, "a.pth")


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


def test_averages_under_names_without_dots_are_taken() -> None:
    plain, average = weights(), {name: tensor + 0.01 for name, tensor in weights().items()}
    dotless = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in average.items()}
    counters = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    content = {"state_dict": {**prefixed("model.", plain), **dotless, **counters}}

    found = checkpoint_of(content, "a.ckpt")

    assert (found.weights, found.variant) == ("ema", "pvt_v2_b0")
    assert_same(found.state, average)
    assert_same(checkpoint_of(content, "a.ckpt", weights="plain").state, plain)


def test_what_timm_saves_during_training_gives_its_average(tmp_path: Path) -> None:
    model = timm.create_model("pvt_v2_b0", num_classes=3)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    average.update(model, step=10)
    saver = timm.utils.CheckpointSaver(
        model, torch.optim.AdamW(model.parameters()), model_ema=average, checkpoint_dir=str(tmp_path),
        args=argparse.Namespace(model="pvt_v2_b0", smoothing=0.1),
    )  # fmt: skip
    saver.save_checkpoint(0, metric=0.9)

    found = open_checkpoint(tmp_path / "last.pth.tar")

    assert (found.weights, found.dialect) == ("ema", "timm")
    assert torch.equal(found.state["head.weight"], average.module.head.weight)
    plain = open_checkpoint(tmp_path / "last.pth.tar", weights="plain")
    assert torch.equal(plain.state["head.weight"], model.head.weight)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile uses it too
@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_wrapped_models_of_any_precision(tmp_path: Path, wrap: Callable[..., Any], dtype: torch.dtype) -> None:
    model = timm.create_model("pvt_v2_b0", num_classes=3).to(dtype)
    torch.save(wrap(model).state_dict(), tmp_path / "best")

    found = open_checkpoint(tmp_path / "best")

    assert found.dialect == "timm"
    assert torch.equal(found.state["norm4.weight"], model.stages[3].norm.weight.float())
    assert found.state["head.weight"].dtype == torch.float32


def test_a_pickle_that_makes_much_of_little_is_refused(tmp_path: Path) -> None:
    text = pickle.dumps("x" * 1_000_000, 2)[2:-1]
    encoded = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    many = b"\x80\x02" + text + b"q\x00](" + encoded * 2000 + b"e."
    zeros = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."

    for data, refused in ((many, "could make 2000000000 bytes"), (zeros, "bytearray")):
        with zipfile.ZipFile(tmp_path / "much.pth", "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3")
        with pytest.raises((WeightsCorrupt, WeightsUnsafe), match=refused):
            open_checkpoint(tmp_path / "much.pth")


def test_mappings_and_lists_of_collections_are_data(tmp_path: Path) -> None:
    history = {"loss": defaultdict(list, {"train": [1.0]}), "last": deque([1, 2], maxlen=3), "seen": Counter("aab")}
    torch.save({"net": weights(), "history": history}, tmp_path / "last.ckpt")

    assert_same(open_checkpoint(tmp_path / "last.ckpt").state, weights())


@pytest.mark.parametrize(
    ("data", "refused"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x1f\x8b\x08\x00", "gunzip"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path: Path, data: bytes, refused: str) -> None:
    (tmp_path / "x.pth").write_bytes(data)

    with pytest.raises(WeightsCorrupt, match=refused):
        open_checkpoint(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile uses it too
def test_a_program_of_torchscript_is_named_and_not_run(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")

    with pytest.raises(WeightsUnsafe, match="TorchScript"):
        open_checkpoint(tmp_path / "x.pt")


def test_mmengines_history_buffers_are_opaque_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mmengine's own class is pickled: arrays, counts, and functions of the class by their names."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    source = """
class HistoryBuffer:
    def __init__(self, log, counts):
        self._log_history, self._count_history, self._max_length = log, counts, 1000000
        self._statistics_methods = {"min": HistoryBuffer.min}
    def min(self):
        raise RuntimeError("it ran")
    def __setstate__(self, state):
        raise RuntimeError("it ran")
"""
    exec(source, module.__dict__)  # noqa: S102  the text above
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, module)
    buffer = module.HistoryBuffer(np.array([1.0, 0.5]), np.array([1, 1]))
    content = {"message_hub": {"log_scalars": {"train/loss": buffer}}, "state_dict": weights()}
    torch.save(content, tmp_path / "epoch_1.pth")

    assert_same(open_checkpoint(tmp_path / "epoch_1.pth").state, weights())
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.delitem(sys.modules, name)
    assert_same(open_checkpoint(tmp_path / "epoch_1.pth").state, weights())


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


PLAIN = weights()
EMA = {name: tensor + 0.01 for name, tensor in PLAIN.items()}
OTHER = {name: tensor + 0.02 for name, tensor in PLAIN.items()}
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

    found = open_checkpoint(path)

    assert (found.weights, found.dialect) == ("ema", "official")
    assert (found.note or "").startswith("EMA weights (")
    assert "--weights plain" in (found.note or "")
    assert_same(found.state, EMA)
    assert_same(open_checkpoint(path, weights="ema").state, EMA)
    plain = open_checkpoint(path, weights="plain")
    assert_same(plain.state, PLAIN)
    assert "left aside" in (plain.note or "")


@pytest.mark.parametrize(
    "content",
    [PLAIN, {"model": PLAIN}, {"state_dict": PLAIN, "state_dict_ema": None}, {"model": PLAIN, "model_ema": {}},
     {"model": PLAIN, "ema_decay": 0.99, "avg_metrics": {"top1": 0.8}},
     {"model": PLAIN, "avg_metrics": {"loss": torch.tensor(0.1)}, "ema_losses": [torch.tensor(0.1), 0.2]},
     {"model": PLAIN, "ema": {"losses": [0.1, 0.2]}}, {**PLAIN, "n_averaged": torch.tensor(7)}],
)  # fmt: skip
def test_plain_weights_alone_are_taken_without_a_word(tmp_path: Path, content: object) -> None:
    path = written(tmp_path / "plain.pth", content)

    found = open_checkpoint(path)

    assert (found.weights, found.note) == ("plain", None)
    assert_same(found.state, PLAIN)
    with pytest.raises(WeightsMismatch, match="no EMA weights"):
        open_checkpoint(path, weights="ema")


def test_ema_weights_alone_are_taken_and_plain_ones_are_not_made_up(tmp_path: Path) -> None:
    path = written(tmp_path / "ema.pth", {"state_dict_ema": EMA, "epoch": 3})

    assert_same(open_checkpoint(path).state, EMA)
    assert "plain" not in (open_checkpoint(path).note or "")
    with pytest.raises(WeightsMismatch, match="only EMA weights"):
        open_checkpoint(path, weights="plain")


@pytest.mark.parametrize(
    ("averages", "message"),
    [
        ({"ema_0.99": EMA, "ema_0.9999": OTHER}, r"several models .'ema_0\.99', 'ema_0\.9999'."),
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
        open_checkpoint(path)
    assert_same(open_checkpoint(path, weights="plain").state, PLAIN)


def test_timm_loads_the_same_of_what_it_writes(tmp_path: Path) -> None:
    path = written(tmp_path / "timm.pth", BOTH["timm"])

    assert_same(open_checkpoint(path).state, timm.models.load_state_dict(str(path), use_ema=True))
    assert_same(open_checkpoint(path, weights="plain").state, timm.models.load_state_dict(str(path), use_ema=False))


@pytest.mark.parametrize("name", ["model", "ema"])
def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path, name: str) -> None:
    content: dict[str, object] = {"model": {}}
    content[name] = {"model": content, "module": content}

    with pytest.raises(WeightsCorrupt):
        open_checkpoint(written(tmp_path / "loop.pth", content))
