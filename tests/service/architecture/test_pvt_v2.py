"""The model against the published figures and against transformers' implementation of it."""

import inspect
from functools import partial
from itertools import pairwise
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PvtV2Config, PvtV2ForImageClassification

from service.architecture.pvt_v2 import PVT_V2, Attention, Block, create
from service.architecture.variants import VARIANTS
from service.architecture.weights import load_into, remap_keys

PARAMETERS = {
    "pvt_v2_b0": 3_666_760,
    "pvt_v2_b1": 14_009_000,
    "pvt_v2_b2": 25_362_856,
    "pvt_v2_b2_li": 22_553_512,
    "pvt_v2_b3": 45_238_696,
    "pvt_v2_b4": 62_556_072,
    "pvt_v2_b5": 81_956_008,
}
TINY: dict[str, Any] = {
    "num_classes": 5,
    "embed_dims": [8, 16, 24, 32],
    "num_heads": [1, 2, 3, 4],
    "depths": [1, 2, 1, 1],
}


def tiny(**arguments: Any) -> PVT_V2:
    """A small model in training mode, the same weights each time."""
    torch.manual_seed(0)
    return PVT_V2(**{**TINY, **arguments})


def part(model: PVT_V2, name: str) -> Any:
    """A submodule, whose class the name tells."""
    return model.get_submodule(name)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def randomize(model: nn.Module) -> None:
    """Give every tensor a say: gains around 1, biases around 0, weights that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.to_empty(device="cpu").named_parameters():
        is_vector = parameter.ndim == 1
        spread = 0.3 if is_vector else parameter[0].numel() ** -0.5
        nn.init.uniform_(parameter, -1.7 * spread, 1.7 * spread, generator=generator)
        if is_vector and name.endswith("weight"):
            parameter.data += 1


def transformers_twin(variant: str) -> PvtV2ForImageClassification:
    row = VARIANTS[variant]
    config: PvtV2Config = PvtV2Config.from_dict(
        {
            "hidden_sizes": row.embed_dims,
            "depths": row.depths,
            "num_attention_heads": row.num_heads,
            "mlp_ratios": row.mlp_ratios,
            "sr_ratios": row.sr_ratios,
            "qkv_bias": row.qkv_bias,
            "linear_attention": row.linear,
            "num_labels": 1000,
        }
    )
    with torch.device("meta"):
        twin = PvtV2ForImageClassification(config)
    for name, module in twin.named_modules():
        # transformers gives every norm its one epsilon, 1e-6. The official code has 1e-5 in these two places, since it
        # passes its `norm_layer` to blocks and stages alone; the published weights were trained so, and we follow it.
        if name.endswith(("patch_embedding.layer_norm", "attention.layer_norm")):
            module.eps = 1e-5
    return twin


@pytest.fixture(scope="module", params=VARIANTS)
def twins(request: pytest.FixtureRequest) -> tuple[PVT_V2, PvtV2ForImageClassification]:
    """Ours and transformers' model of one variant, with the same weights."""
    reference = transformers_twin(request.param)
    randomize(reference)
    with torch.device("meta"):
        model = create(request.param)
    load_into(model, remap_keys(reference.state_dict()))
    return model.eval(), reference.train(mode=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_has_its_published_number_of_parameters(variant: str) -> None:
    with torch.device("meta"):
        model = create(variant)

    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[variant]


@pytest.mark.parametrize("size", [(224, 224), (160, 224)])
@torch.inference_mode()
def test_logits_and_maps_are_those_of_transformers(
    twins: tuple[PVT_V2, PvtV2ForImageClassification], size: tuple[int, int]
) -> None:
    model, reference = twins
    x = images(1, 3, *size)

    ours, theirs = model.forward_all(x, stages=(1, 2, 3, 4)), reference(x, output_hidden_states=True)

    assert theirs.logits.std() > 0.1  # equality of logits that are all alike would say nothing
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.stages, theirs.hidden_states, atol=1e-3, rtol=1e-4)


def test_signature_is_the_contract() -> None:
    assert {name: p.default for name, p in inspect.signature(PVT_V2).parameters.items()} == {
        "img_size": 224,
        "patch_size": 7,
        "in_channels": 3,
        "num_classes": 1000,
        "embed_dims": [64, 128, 256, 512],
        "num_heads": [1, 2, 4, 8],
        "mlp_ratios": [4, 4, 4, 4],
        "qkv_bias": False,
        "qk_scale": None,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "norm_layer": nn.LayerNorm,
        "depths": [3, 4, 6, 3],
        "sr_ratios": [8, 4, 2, 1],
        "num_stages": 4,
        "linear": False,
    }


def test_instances_share_no_default() -> None:
    defaults = [p.default for p in inspect.signature(PVT_V2).parameters.values() if isinstance(p.default, list)]
    with torch.device("meta"):
        model = PVT_V2()

    kept = [value for module in model.modules() for value in vars(module).values()]
    assert not any(value is default for value in kept for default in defaults)


@given(height=st.integers(29, 100), width=st.integers(29, 100))
@settings(max_examples=15, deadline=None)
@torch.inference_mode()
def test_any_size_works_and_halves_from_stage_to_stage(height: int, width: int) -> None:
    outputs = tiny().eval().forward_all(images(2, 3, height, width), stages=(1, 2, 3, 4))

    assert outputs.logits.shape == (2, 5)
    assert outputs.embedding.shape == (2, 32)
    sides = [height, width]
    for stage, channels, stride in zip(outputs.stages, TINY["embed_dims"], (4, 2, 2, 2), strict=True):
        sides = [ceil(side / stride) for side in sides]
        assert stage.shape == (2, channels, *sides)


@torch.inference_mode()
def test_embedding_is_the_mean_of_the_last_map_and_the_input_of_the_head() -> None:
    model = tiny().eval()
    x = images(2, 3, 64, 96)

    outputs = model.forward_all(x, stages=(4, 1))

    torch.testing.assert_close(outputs.embedding, outputs.stages[0].mean(dim=(2, 3)))
    torch.testing.assert_close(model.head(outputs.embedding), outputs.logits)
    torch.testing.assert_close(model(x), outputs.logits)
    assert outputs.stages[1].shape == (2, 8, 16, 24)


@torch.inference_mode()
def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, x = tiny().eval(), images(3, 3, 64, 64)

    torch.testing.assert_close(model(x), torch.cat([model(one) for one in torch.split(x, 1)]), atol=1e-6, rtol=1e-5)


def test_img_size_must_be_enough_for_all_stages_and_binds_no_input() -> None:
    assert tiny(img_size=64)(images(1, 3, 96, 32)).shape == (1, 5)
    with pytest.raises(ValueError, match="img_size must be at least 29, not 28"):
        tiny(img_size=28)


@pytest.mark.parametrize("patch_size", [4, 7, 11])
def test_patch_size_is_the_first_kernel_and_keeps_stride_4(patch_size: int) -> None:
    model = tiny(patch_size=patch_size)

    kernels = [part(model, f"patch_embed{i}.proj").weight.shape[-1] for i in (1, 2, 3, 4)]
    assert kernels == [patch_size, 3, 3, 3]
    x = images(1, 3, model.min_side, model.min_side)
    assert model(x).isfinite().all()
    assert model.forward_all(images(1, 3, 64, 64), stages=[1]).stages[0].shape[2] in {16, 17}
    with pytest.raises(ValueError, match="input_shape"):
        model(x[:, :, 1:])


def test_in_channels_and_num_classes_shape_input_and_output() -> None:
    assert tiny(in_channels=1, num_classes=7)(images(2, 1, 32, 32)).shape == (2, 7)


def test_no_classes_leave_the_embedding_as_logits() -> None:
    outputs = tiny(num_classes=0).forward_all(images(2, 3, 32, 32))

    assert torch.equal(outputs.logits, outputs.embedding)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_fewer_stages_are_the_first_ones_of_the_whole(num_stages: int) -> None:
    whole, part = tiny().eval(), tiny(num_stages=num_stages).eval()
    x = images(1, 3, 64, 64)
    head_apart = {name: value for name, value in whole.state_dict().items() if not name.startswith("head")}

    missing = part.load_state_dict(head_apart, strict=False).missing_keys

    assert missing == ["head.weight", "head.bias"]
    torch.testing.assert_close(
        part.forward_all(x, [num_stages]).stages, whole.forward_all(x, [num_stages]).stages, atol=1e-6, rtol=1e-5
    )


def test_lists_may_be_as_long_as_there_are_stages() -> None:
    model = PVT_V2(
        num_stages=2, embed_dims=(8, 12), num_heads=(2, 3), mlp_ratios=(1.5, 2), depths=(1, 2), sr_ratios=(2, 1)
    )

    assert model.forward_all(images(1, 3, 16, 16), [2]).stages[0].shape == (1, 12, 2, 2)
    assert len(part(model, "block2")) == 2
    assert part(model, "block1.0.mlp.fc1").weight.shape == (12, 8)
    assert part(model, "block1.0.attn.sr").weight.shape == (8, 8, 2, 2)
    assert not hasattr(part(model, "block2.0.attn"), "sr")


def test_qkv_bias_exists_only_on_request() -> None:
    biases = {"block1.0.attn.q.bias", "block1.0.attn.kv.bias"}

    assert not biases & tiny().state_dict().keys()
    assert biases <= tiny(qkv_bias=True).state_dict().keys()


@torch.inference_mode()
def test_qk_scale_replaces_the_inverse_root_of_a_heads_channels() -> None:
    x = images(1, 3, 64, 64)
    by_default = tiny().eval()(x)

    assert torch.equal(tiny(qk_scale=8**-0.5).eval()(x), by_default)  # each head of TINY has 8 channels
    assert not torch.allclose(tiny(qk_scale=5.0).eval()(x), by_default, atol=1e-7)


def test_norm_layer_makes_block_and_stage_norms_and_no_others() -> None:
    model = tiny(norm_layer=partial(nn.LayerNorm, eps=0.25))
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}

    for name, value in eps.items():
        assert value == (1e-5 if name.endswith("attn.norm") or name.startswith("patch_embed") else 0.25)
    assert sum(value == 0.25 for value in eps.values()) == 2 * sum(TINY["depths"]) + 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_block_and_stage_norms_have_epsilon_1e_6(variant: str) -> None:
    with torch.device("meta"):
        model = create(variant)

    assert part(model, "block3.1.norm2").eps == part(model, "norm4").eps == 1e-6
    assert part(model, "patch_embed2.norm").eps == part(model, "block1.0.attn.norm").eps == 1e-5


@torch.inference_mode()
def test_linear_reads_keys_and_values_from_7_by_7_whatever_the_ratios() -> None:
    x = images(1, 3, 64, 64)
    coarse, fine = (tiny(linear=True, sr_ratios=[ratio] * 4).eval() for ratio in (16, 1))

    assert part(coarse, "block4.0.attn.sr").weight.shape == (32, 32, 1, 1)
    assert coarse.min_side == 1
    assert torch.equal(coarse(x), fine(x))


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_drop_rates_act_in_training_and_vanish_in_eval(rate: str) -> None:
    dropping, x = tiny(**{rate: 0.5}), images(4, 3, 64, 64)

    assert not torch.equal(dropping(x), dropping(x))
    assert torch.equal(dropping.eval()(x), tiny().eval()(x))


def test_drop_rate_1_silences_both_branches() -> None:
    block = part(tiny(drop_rate=1), "block1.0")
    x = images(2, 256, 8)

    assert torch.equal(block(x, (16, 16)), x)


def test_attn_drop_rate_1_leaves_only_the_projections_bias() -> None:
    attention = part(tiny(attn_drop_rate=1), "block1.0.attn")
    assert isinstance(attention, Attention)
    nn.init.ones_(attention.proj.bias)

    assert torch.equal(attention(images(2, 256, 8), (16, 16)), torch.ones(2, 256, 8))


def test_stochastic_depth_rises_linearly_and_drops_whole_images() -> None:
    model = tiny(drop_path_rate=0.8)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    x = images(64, 4, 32)

    rates = [block.drop_path_rate for block in blocks]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert all(a < b for a, b in pairwise(rates))
    untouched = (blocks[-1](x, (2, 2)) == x).flatten(1).all(1).float().mean()
    assert 0.4 < untouched < 0.9  # 0.8 ** 2 = 0.64 of them skip both branches


def test_weights_start_as_the_official_ones() -> None:
    torch.manual_seed(0)
    model = create("pvt_v2_b0")

    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
    assert part(model, "head").weight.std().item() == pytest.approx(0.02, rel=0.05)
    depthwise = part(model, "block1.0.mlp.dwconv.dwconv").weight
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("linear", [False, True])
@torch.no_grad()
def test_model_traces_and_exports_without_warnings(linear: bool) -> None:
    model, x = tiny(linear=linear).eval(), images(2, 3, 64, 96)

    traced = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_stages", 0),
        ("num_stages", 5),
        ("img_size", 0),
        ("patch_size", 0),
        ("in_channels", -3),
        ("num_classes", -1),
        ("embed_dims", [8, 16, 24]),
        ("embed_dims", [8, 16, 24, 31]),
        ("embed_dims", [8, 16, 0, 32]),
        ("num_heads", [1, 2, 3, 4, 5]),
        ("num_heads", [1, 2, 3, 0]),
        ("mlp_ratios", []),
        ("mlp_ratios", [4, 4, 4, -4]),
        ("depths", [1, 1, 1, 0]),
        ("sr_ratios", [8, 4, 2, 0]),
        ("drop_rate", -0.1),
        ("attn_drop_rate", 1.1),
        ("drop_path_rate", float("nan")),
    ],
)
def test_bad_argument_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*") as caught:
        tiny(**{name: value})

    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 28, 64), (1, 3, 64, 28), (1, 1, 3, 64, 64), (3,)]
)
def test_input_that_cannot_pass_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input_shape must be .*at least 29") as caught:
        tiny()(torch.zeros(shape))

    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("stages", [(0,), (1, 5)])
def test_unknown_stage_is_refused(stages: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="stages must be from 1 to 4"):
        tiny().forward_all(torch.zeros(1, 3, 32, 32), stages)


def test_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"pvt_v2_b9.*pvt_v2_b0, .*pvt_v2_b5"):
        create("pvt_v2_b9")


def test_create_takes_arguments_of_the_model() -> None:
    model = create("pvt_v2_b0", num_classes=10, depths=(1, 1, 1, 1))

    assert model.head.weight.shape == (10, 256)
    assert len(part(model, "block1")) == 1
