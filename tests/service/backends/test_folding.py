from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.variants import VARIANTS
from service.backends.folding import RootMeanSquareNorm, fold_norms

ALL = (1, 2, 3, 4)


def trained(variant: str, **overrides: Any) -> PVT_V2:
    """A model in float64 whose norms and biases do something, as those of a trained one."""
    torch.manual_seed(0)
    with torch.device("meta"):  # `create` draws numbers of its own for each parameter, which takes seconds
        model = create(variant, **overrides).double().eval()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if (bias := getattr(module, "bias", None)) is not None:
            nn.init.normal_(bias, std=0.2)
    return model


def largest_difference(model: PVT_V2, other: PVT_V2) -> float:
    """Between the logits, embeddings and maps of both for the same images."""
    images = torch.randn(1, 3, 32, 64, dtype=next(model.parameters()).dtype)
    with torch.inference_mode():
        ours, theirs = (
            model.forward_all(images, ALL[: model.num_stages]),
            other.forward_all(images, ALL[: model.num_stages]),
        )
    pairs = zip([*ours[:2], *ours.stages], [*theirs[:2], *theirs.stages], strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folded_model_is_the_same_function(variant: str) -> None:
    plain = trained(variant, depths=(2, 1, 2, 1))  # deeper ones repeat the same blocks
    folded = deepcopy(plain)
    fold_norms(folded)

    assert [each for each in folded.modules() if isinstance(each, nn.LayerNorm)] == []
    assert largest_difference(plain, folded) < 1e-11


@pytest.mark.parametrize(
    "arguments",
    [{"qkv_bias": False}, {"num_stages": 3}, {"num_classes": 0}, {"qk_scale": 0.1}, {"patch_size": 3}],
    ids=str,
)
def test_so_is_one_of_other_arguments(arguments: dict[str, Any]) -> None:
    plain = trained("pvt_v2_b0", **arguments)
    folded = deepcopy(plain)
    fold_norms(folded)

    assert largest_difference(plain, folded) < 1e-11


def test_float32_is_off_by_roundings_only_and_folding_twice_changes_nothing() -> None:
    plain = trained("pvt_v2_b0").float()
    folded = deepcopy(plain)
    fold_norms(folded)
    again = deepcopy(folded)
    fold_norms(again)

    assert largest_difference(plain, folded) < 1e-4
    assert largest_difference(folded, again) == 0
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float32}


def test_the_norm_is_torchs_own_with_a_shift() -> None:
    norm = nn.LayerNorm(16, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    reference = nn.RMSNorm(16, eps=1e-3)
    reference.weight = norm.weight
    x = torch.randn(4, 5, 16)

    torch.testing.assert_close(RootMeanSquareNorm(norm, affine=True)(x), reference(x) + norm.bias)
