"""PVT-v2 with root mean square norms in place of layer norms, the same function with less to compute.

A layer norm reads its input x only by its difference from the mean, J x with J = I - 11'/C: LN(x) = g * RMS(J x) + b,
where RMS(y) = y / sqrt(mean(y^2) + eps), since var(x) = mean((J x)^2). So J goes into what writes x, once, instead of
into each norm:

- A convolution in front of a norm (of a patch embedding, of a spatial reduction) writes J (W x + c) = (J W) x + J c.
- In a stage all norms read the residual stream, and only they do: a sum of the patch embedding, whose mean is taken off
  once, and of what `attn.proj` and `mlp.fc2` add, whose weights take J as above. J of a sum is the sum of J.

Then g and b go into the layer that reads the norm, W (g * y + b) + c = (W diag(g)) y + (W b + c): of a block's first
norm `q`, and `kv` or the reduction; of the second `fc1`; of a reduction's norm `kv`, unless a GELU is in between. Those
of patch embeddings and of a stage's last norm stay, since their outputs are read otherwise.

RMSNorm is of https://arxiv.org/abs/1910.07467; that a layer norm becomes one by centred weights is shown in
https://arxiv.org/abs/2305.14858.
"""

from typing import cast

import torch
from torch import Tensor, nn

from service.architecture.pvt_v2 import PVT_V2, Block

Layer = nn.Linear | nn.Conv2d


class RootMeanSquareNorm(nn.Module):
    """g * x / sqrt(mean(x^2) + eps) + b over the last axis; without `affine` g is 1 and b is 0."""

    def __init__(self, of: nn.Module, *, affine: bool) -> None:
        super().__init__()
        norm = cast("nn.LayerNorm", of)
        self.eps = norm.eps
        self.weight: Tensor | None = norm.weight if affine else None
        self.bias: Tensor | None = norm.bias if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


class Centred(nn.Module):
    """A norm, and then the mean over the last axis taken off."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        x = self.norm(x)
        return x - x.mean(dim=-1, keepdim=True)


@torch.no_grad()
def fold_norms(model: PVT_V2) -> None:
    """Give `model` root mean square norms, unless it has them; it answers the same, up to rounding.

    Its weights are replaced one by one, so that they do not take twice the memory.
    """
    if isinstance(model.norm1, RootMeanSquareNorm):
        return
    for stage in range(1, model.num_stages + 1):
        embedding = getattr(model, f"patch_embed{stage}")
        _centre(embedding.proj)
        embedding.norm = Centred(RootMeanSquareNorm(embedding.norm, affine=True))
        for block in getattr(model, f"block{stage}"):
            _fold_block(block)
        name = f"norm{stage}"
        setattr(model, name, RootMeanSquareNorm(getattr(model, name), affine=True))


def _fold_block(block: Block) -> None:
    attention = block.attn
    _absorb(block.norm1, attention.q, attention.sr if attention.reduces else attention.kv)
    _absorb(block.norm2, block.mlp.fc1)
    block.norm1, block.norm2 = (RootMeanSquareNorm(norm, affine=False) for norm in (block.norm1, block.norm2))
    if attention.reduces:
        _centre(attention.sr)
        if not attention.linear:
            _absorb(attention.norm, attention.kv)
        attention.norm = RootMeanSquareNorm(attention.norm, affine=attention.linear)
    _centre(attention.proj)
    _centre(block.mlp.fc2)


def _centre(layer: Layer) -> None:
    """Take the mean over its channels off what `layer` writes."""
    for name in ("weight", "bias"):
        if (value := getattr(layer, name)) is not None:
            exact = value.double()
            setattr(layer, name, nn.Parameter((exact - exact.mean(dim=0, keepdim=True)).to(value.dtype)))


def _absorb(of: nn.Module, *readers: Layer) -> None:
    """Move the scale and the shift of the norm `of` into the layers that read it; none of them pads."""
    norm = cast("nn.LayerNorm", of)
    for layer in readers:
        weight, scale = layer.weight.double(), norm.weight.double()
        shift = weight.reshape(*weight.shape[:2], -1).sum(dim=2) @ norm.bias.double()
        shift = shift if layer.bias is None else shift + layer.bias
        by_channel = scale.reshape(-1, *[1] * (weight.ndim - 2))  # of the second axis of a weight
        layer.weight, layer.bias = (nn.Parameter(each.to(layer.weight.dtype)) for each in (weight * by_channel, shift))
