"""What a checkpoint itself answers: PVT-v2 in float64 on a checkpoint's own tensors, under its library's own names.

It is written apart from the model that serves and from the conversion of names, and shares no code with either, so that
a tensor that the conversion puts in a wrong place shows, even where the shapes are the same. The sources are the four
libraries' modules: see `service.architecture.weights`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from numpy.typing import NDArray
from torch import Tensor

from service.architecture.variants import Dialect, Variant

Logits = NDArray[np.float64]

_STRIDES = (4, 2, 2, 2)
_POOLED = 7  # the side of the map that linear attention takes keys and values from


@dataclass(frozen=True, slots=True)
class _Names:
    """A library's names: `{0}` is a stage counted from 0, `{1}` the same from 1, `{2}` a block. `kv` None: two tensors.

    `eps` is the epsilon of its norms of patches and of reduced maps; all others have 1e-6.
    """

    patches: str
    block: str
    norm: str
    head: str
    parts: Mapping[str, str]
    first_patches: str | None = None
    patch_conv: str = "proj"
    patch_norm: str = "norm"
    eps: float = 1e-5


_PARTS: Final = MappingProxyType(
    {
        "norm1": "norm1", "norm2": "norm2", "q": "attn.q", "kv": "attn.kv", "sr": "attn.sr", "sr_norm": "attn.norm",
        "proj": "attn.proj", "fc1": "mlp.fc1", "dwconv": "mlp.dwconv.dwconv", "fc2": "mlp.fc2",
    }
)  # fmt: skip
_TIMM = _Names(
    patches="stages.{0}.downsample", first_patches="patch_embed", block="stages.{0}.blocks.{2}",
    norm="stages.{0}.norm", head="head", parts=MappingProxyType({**_PARTS, "dwconv": "mlp.dwconv"}),
)  # fmt: skip
_NAMES: Mapping[Dialect, _Names] = MappingProxyType(
    {
        "official": _Names("patch_embed{1}", "block{1}.{2}", "norm{1}", "head", _PARTS),
        "timm": _TIMM,
        "lucid": _Names(_TIMM.patches, _TIMM.block, _TIMM.norm, "classifier", _TIMM.parts, _TIMM.first_patches),
        "transformers": _Names(
            "encoder.layers.{0}.patch_embedding", "encoder.layers.{0}.blocks.{2}",
            "encoder.layers.{0}.layer_norm", "classifier",
            MappingProxyType(
                {
                    "norm1": "layer_norm_1", "norm2": "layer_norm_2", "q": "attention.query", "k": "attention.key",
                    "v": "attention.value", "sr": "attention.spatial_reduction", "sr_norm": "attention.layer_norm",
                    "proj": "attention.proj", "fc1": "mlp.dense1", "dwconv": "mlp.dwconv.dwconv", "fc2": "mlp.dense2",
                }
            ),
            patch_norm="layer_norm", eps=1e-6,
        ),
        # `PyramidVisionTransformerV2`: query, key and value are one tensor, 1 x 1 convolutions are linear layers.
        "mmdetection": _Names(
            "layers.{0}.0", "layers.{0}.1.{2}", "layers.{0}.2", "head",
            MappingProxyType(
                {
                    **_PARTS, "qkv": "attn.attn.in_proj", "proj": "attn.attn.out_proj", "fc1": "ffn.layers.0",
                    "dwconv": "ffn.layers.1", "fc2": "ffn.layers.4",
                }
            ),
            patch_conv="projection", eps=1e-6,
        ),
    }
)  # fmt: skip


class _Layer:
    """The tensors of a checkpoint under one prefix, and the operations that take them."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def _pair(self, name: str) -> tuple[Tensor, Tensor | None]:
        path = f"{self._prefix}.{name}".strip(".")
        bias = self._state.get(f"{path}.bias")
        return self._state[f"{path}.weight"].double(), None if bias is None else bias.double()

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._pair(name)
        return F.linear(x, weight.flatten(1), bias)

    def third(self, name: str, number: int, x: Tensor) -> Tensor:
        """One of three linear layers that are one tensor."""
        path = f"{self._prefix}.{name}"
        weight, bias = (self._state[f"{path}_{kind}"].double().chunk(3)[number] for kind in ("weight", "bias"))
        return F.linear(x, weight, bias)

    def norm(self, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        weight, bias = self._pair(name)
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        return F.conv2d(x, *self._pair(name), stride, padding, 1, groups)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


@dataclass(frozen=True, slots=True)
class _Block:
    layer: _Layer
    names: _Names
    heads: int
    reduction: int
    linear: bool

    def __call__(self, x: Tensor, height: int, width: int) -> Tensor:
        part = self.names.parts
        x = x + self._attention(self.layer.norm(part["norm1"], x), height, width)
        hidden = self.layer.linear(part["fc1"], self.layer.norm(part["norm2"], x))
        hidden = F.relu(hidden) if self.linear else hidden
        hidden = _map(hidden, height, width)
        hidden = self.layer.conv(part["dwconv"], hidden, padding=1, groups=hidden.shape[1])
        return x + self.layer.linear(part["fc2"], F.gelu(_tokens(hidden)))

    def _attention(self, x: Tensor, height: int, width: int) -> Tensor:
        part, layer = self.names.parts, self.layer
        reduced = x
        if self.linear:
            pooled = F.adaptive_avg_pool2d(_map(x, height, width), _POOLED)
            reduced = F.gelu(layer.norm(part["sr_norm"], _tokens(layer.conv(part["sr"], pooled)), self.names.eps))
        elif self.reduction > 1:
            smaller = layer.conv(part["sr"], _map(x, height, width), self.reduction)
            reduced = layer.norm(part["sr_norm"], _tokens(smaller), self.names.eps)
        if "qkv" in part:
            queries, keys, values = (
                layer.third(part["qkv"], number, each) for number, each in enumerate((x, reduced, reduced))
            )
        elif "kv" in part:
            queries, (keys, values) = layer.linear(part["q"], x), layer.linear(part["kv"], reduced).chunk(2, dim=-1)
        else:
            queries = layer.linear(part["q"], x)
            keys, values = layer.linear(part["k"], reduced), layer.linear(part["v"], reduced)
        queries, keys, values = map(self._by_head, (queries, keys, values))
        weights = (queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5).softmax(dim=-1)
        return layer.linear(part["proj"], (weights @ values).transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


def own_logits(
    state: Mapping[str, Tensor],
    dialect: Dialect,
    row: Variant,
    images: NDArray[np.uint8],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Logits:
    """Logits (n, classes) of uint8 `images` (n, height, width, 3) by the tensors of a checkpoint as they were written.

    Without a head they are the embeddings (n, channels). Raises KeyError for a tensor that `state` lacks under the
    names of `dialect`.
    """
    state = {name.removeprefix("pvt_v2."): tensor for name, tensor in state.items()}
    with torch.inference_mode():
        pixels = (images / 255 - np.array(mean)) / np.array(std)
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return np.concatenate([_forward(state, _NAMES[dialect], row, image[None]).numpy() for image in batch])


def _forward(state: Mapping[str, Tensor], names: _Names, row: Variant, x: Tensor) -> Tensor:
    """Logits (B, classes) of normalised float64 images (B, 3, H, W)."""
    for stage, depth in enumerate(row.depths):
        first = names.first_patches if stage == 0 else None
        patches = _Layer(state, first or names.patches.format(stage, stage + 1))
        x = patches.conv(names.patch_conv, x, _STRIDES[stage], 3 if stage == 0 else 1)
        height, width = x.shape[2:]
        tokens = patches.norm(names.patch_norm, _tokens(x), names.eps)
        for number in range(depth):
            layer = _Layer(state, names.block.format(stage, stage + 1, number))
            block = _Block(layer, names, row.num_heads[stage], row.sr_ratios[stage], row.linear)
            tokens = block(tokens, height, width)
        x = _map(_Layer(state, names.norm.format(stage, stage + 1)).norm("", tokens), height, width)
    embedding = x.mean(dim=(2, 3))
    return _Layer(state, names.head).linear("", embedding) if f"{names.head}.weight" in state else embedding
