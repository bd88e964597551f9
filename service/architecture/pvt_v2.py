"""Pyramid Vision Transformer v2 (https://arxiv.org/abs/2106.13797).

Names, initialisation and arithmetic are those of the authors' `classification/pvt_v2.py` (github.com/whai362/PVT).
Different on purpose: `patch_size` is obeyed (theirs always takes 7), attention is one fused call, and one forward can
also return the embedding and stage maps. Odd on purpose, as theirs: `norm_layer` makes the norms of blocks and stages
(with epsilon 1e-6 in the variants), but norms after a patch embedding or a spatial reduction have 1e-5.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import mod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its customary name

from service.architecture.variants import VARIANTS

Size = tuple[int, int]  # (H, W) of a map; as tokens it is N = H * W long
STRIDES = (4, 2, 2, 2)  # of the patch embeddings


class Shared(NamedTuple):
    """The arguments of `PVT_V2` that all blocks share."""

    qkv_bias: bool
    qk_scale: float | None
    drop_rate: float
    attn_drop_rate: float
    norm_layer: Callable[[int], nn.Module]
    linear: bool


def _to_map(x: Tensor, hw: Size) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *hw)  # (B, N, C) -> (B, C, H, W)


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)


class Attention(nn.Module):
    """Multi-head attention whose keys and values are computed on a coarser grid than its queries."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, shared: Shared) -> None:
        super().__init__()
        self.num_heads, self.linear = num_heads, shared.linear
        self.drop_rate, self.attn_drop_rate = shared.drop_rate, shared.attn_drop_rate
        self.scale = (dim // num_heads) ** -0.5 if shared.qk_scale is None else shared.qk_scale
        self.q = nn.Linear(dim, dim, bias=shared.qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=shared.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        side = 1 if self.linear else sr_ratio
        self.reduces = self.linear or side > 1
        if self.reduces:
            self.sr = nn.Conv2d(dim, dim, side, side)
            self.norm: nn.Module = nn.LayerNorm(dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, N, C) -> (B, heads, N, C / heads)

    def forward(self, x: Tensor, hw: Size) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q = self._split(self.q(x))
        if self.reduces:
            grid = _to_map(x, hw)
            grid = F.adaptive_avg_pool2d(grid, 7) if self.linear else grid  # the paper's P is 7
            x = self.norm(_to_tokens(self.sr(grid)))
            x = F.gelu(x) if self.linear else x
        k, v = map(self._split, self.kv(x).chunk(2, dim=2))
        drop = self.attn_drop_rate if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        x = self.proj(x.transpose(1, 2).flatten(2))  # (B, heads, N, C / heads) -> (B, N, C)
        return F.dropout(x, self.drop_rate, self.training)


class Mlp(nn.Module):
    """Two linear layers around a depthwise convolution, whose zero padding encodes the tokens' positions."""

    def __init__(self, dim: int, hidden: int, shared: Shared) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.relu = nn.ReLU() if shared.linear else nn.Identity()
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})
        self.fc2 = nn.Linear(hidden, dim)
        self.drop_rate = shared.drop_rate

    def forward(self, x: Tensor, hw: Size) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = self.dwconv["dwconv"](_to_map(self.relu(self.fc1(x)), hw))
        x = F.dropout(F.gelu(_to_tokens(x)), self.drop_rate, self.training)
        return F.dropout(self.fc2(x), self.drop_rate, self.training)


class Block(nn.Module):
    """Attention, then the MLP; each reads its input normalised and adds to it."""

    def __init__(self, dim: int, heads: int, ratio: float, sr: int, *, drop_path_rate: float, shared: Shared) -> None:
        super().__init__()
        self.norm1, self.attn = shared.norm_layer(dim), Attention(dim, heads, sr, shared)
        self.norm2, self.mlp = shared.norm_layer(dim), Mlp(dim, int(dim * ratio), shared)
        self.drop_path_rate = drop_path_rate

    def _drop_path(self, x: Tensor) -> Tensor:
        if self.drop_path_rate == 0 or not self.training:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, 1), self.drop_path_rate)  # one draw for each image

    def forward(self, x: Tensor, hw: Size) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self._drop_path(self.attn(self.norm1(x), hw))
        return x + self._drop_path(self.mlp(self.norm2(x), hw))


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution from one stage's map to the next one's tokens."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """(B, C, H, W) -> the tokens (B, N, C) and their map's size."""
        x = self.proj(x)
        return self.norm(_to_tokens(x)), (x.shape[2], x.shape[3])


class Outputs(NamedTuple):
    """Of one forward: logits (B, classes), embedding (B, C), and the requested stage maps (B, C, H, W)."""

    logits: Tensor
    embedding: Tensor
    stages: tuple[Tensor, ...]


def _check(bounds: str, ok: Callable[[Any], bool], **arguments: object) -> None:
    for name, value in arguments.items():
        if not ok(value):
            raise ValueError(f"{name} must be {bounds}, not {value!r}")


def _check_arguments(a: Mapping[str, Any]) -> None:
    """Check the arguments of `PVT_V2`, by their names."""
    count = a["num_stages"]
    _check("1, 2, 3 or 4", lambda n: n in range(1, 5), num_stages=count)
    _check("at least 1", lambda n: n >= 1, patch_size=a["patch_size"], in_channels=a["in_channels"])
    _check("at least 0", lambda n: n >= 0, num_classes=a["num_classes"])
    _check("from 0 to 1", lambda rate: 0 <= rate <= 1, **{name: a[name] for name in a if name.endswith("_rate")})
    lists = {name: a[name] for name in ("embed_dims", "num_heads", "mlp_ratios", "sr_ratios", "depths")}
    _check(f"{count} positive numbers", lambda v: len(v) in {count, 4} and min(v) > 0, **lists)
    heads = a["num_heads"]
    _check(f"divisible by num_heads {heads}", lambda v: not any(map(mod, v[:count], heads)), embed_dims=a["embed_dims"])


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


class PVT_V2(nn.Module):
    """Stages of a patch embedding, `depths[i]` blocks and a norm, then a linear head on the mean of the last map.

    Lists hold a value for each stage; of four, the first `num_stages` count. `img_size` is a hint, checked to be
    enough: `forward` takes any H and W from `min_side` on. `patch_size` is the first embedding's kernel (stride 4; the
    others have kernel 3, stride 2). `num_classes` 0 leaves the head out: logits are then the embedding. `qk_scale`
    replaces 1 / sqrt(channels of a head). The drop rates act in training only; `drop_path_rate`, stochastic depth, is
    the last block's and rises linearly from 0 in the first. `linear` takes keys and values from a map pooled to 7 x 7
    instead of reduced by `sr_ratios`, and adds a ReLU to each MLP. Raises ValueError for an argument out of bounds.
    """

    def __init__(  # noqa: PLR0917 - this signature is a contract
        self, img_size: int = 224, patch_size: int = 7, in_channels: int = 3, num_classes: int = 1000,
        embed_dims: Sequence[int] = [64, 128, 256, 512], num_heads: Sequence[int] = [1, 2, 4, 8],
        mlp_ratios: Sequence[float] = [4, 4, 4, 4], qkv_bias: bool = False, qk_scale: float | None = None,  # noqa: FBT001, FBT002
        drop_rate: float = 0.0, attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm, depths: Sequence[int] = [3, 4, 6, 3],
        sr_ratios: Sequence[int] = [8, 4, 2, 1], num_stages: int = 4, linear: bool = False,  # noqa: FBT001, FBT002
    ) -> None:  # fmt: skip
        _check_arguments(locals())  # by their names, before anything else has one
        super().__init__()
        kernels = (patch_size, 3, 3, 3)[:num_stages]
        self.in_channels, self.num_stages = in_channels, num_stages
        self.min_side = 1  # the least H and W of an input from which each stage gets a map that can be reduced
        for kernel, stride, ratio in [*zip(kernels, STRIDES, sr_ratios, strict=False)][::-1]:
            self.min_side = max(1, (max(self.min_side, 1 if linear else ratio) - 1) * stride + kernel % 2)
        _check(f"at least {self.min_side}", lambda n: n >= self.min_side, img_size=img_size)
        shared = Shared(qkv_bias, qk_scale, drop_rate, attn_drop_rate, norm_layer, linear)
        ramp = iter(torch.linspace(0, drop_path_rate, sum(depths[:num_stages]), device="cpu").tolist())
        for i, kernel in enumerate(kernels):
            dim, stage = embed_dims[i], (num_heads[i], mlp_ratios[i], sr_ratios[i])
            blocks = [Block(dim, *stage, drop_path_rate=next(ramp), shared=shared) for _ in range(depths[i])]
            self.add_module(f"patch_embed{i + 1}", PatchEmbed(in_channels, dim, kernel, STRIDES[i]))
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", norm_layer(dim))
            in_channels = dim
        self.head = nn.Linear(in_channels, num_classes) if num_classes else nn.Identity()
        if not next(self.parameters()).is_meta:  # a checkpoint is loaded next, and drawing numbers takes a second
            self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, in_channels, H, W); see `forward_all`."""
        return self.forward_all(x).logits

    def forward_all(self, x: Tensor, stages: Sequence[int] = ()) -> Outputs:
        """All that one pass over images (B, in_channels, H, W) yields, with the maps of `stages`, counted from 1.

        Maps are outputs of their stage's norm and have strides 4, 8, 16, 32; the embedding is the mean of the last one.
        Raises ValueError for a wrong input shape, unless while tracing, or a wrong stage.
        """
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):  # type: ignore[attr-defined, no-untyped-call]
            bounds = f"(B, {self.in_channels}, H, W) with H and W at least {self.min_side}"
            ok = x.shape[1:-2] == (self.in_channels,) and min(x.shape[2:]) >= self.min_side
            _check(bounds, lambda _: ok, input_shape=tuple(x.shape))
        _check(f"from 1 to {self.num_stages}", lambda v: set(v) <= {*range(1, self.num_stages + 1)}, stages=stages)
        maps = []
        for i in range(1, self.num_stages + 1):
            tokens, hw = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                tokens = block(tokens, hw)
            maps.append(x := _to_map(getattr(self, f"norm{i}")(tokens), hw))
        embedding = x.mean(dim=(2, 3))
        return Outputs(self.head(embedding), embedding, tuple(maps[i - 1] for i in stages))


def create(variant: str, **overrides: Any) -> PVT_V2:  # noqa: ANN401 - any argument of PVT_V2, checked there
    """A model with fresh weights; `overrides` replace the variant's arguments. Raises ValueError as `PVT_V2`, too."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    arguments = dict(vars(VARIANTS[variant]))
    arguments["norm_layer"] = partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
    return PVT_V2(**{**arguments, **overrides})
