"""The variants of the family as data: the paper's table 1 (https://arxiv.org/abs/2106.13797)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Dialect = Literal[
    "official", "timm", "transformers", "lucid", "mmdetection"
]  # whose names the tensors of a checkpoint have
Weights = Literal["plain", "ema"]  # those that were trained, or their exponential moving average


@dataclass(frozen=True)
class Variant:
    """A row of the table: the arguments of `PVT_V2` that make a variant; a value for each of four stages."""

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    qkv_bias: bool = True
    norm_eps: float = 1e-6  # of block and stage norms
    linear: bool = False

    def map_numbers(self, height: int, width: int) -> int:
        """How many numbers the four stage maps of an image of `height` x `width` have."""
        return sum(dim * (height // s) * (width // s) for dim, s in zip(self.embed_dims, (4, 8, 16, 32), strict=True))


_WIDE = (64, 128, 320, 512)
VARIANTS: Mapping[str, Variant] = MappingProxyType({
    "pvt_v2_b0": Variant((32, 64, 160, 256), (2, 2, 2, 2)),
    "pvt_v2_b1": Variant(_WIDE, (2, 2, 2, 2)),
    "pvt_v2_b2": Variant(_WIDE, (3, 4, 6, 3)),
    "pvt_v2_b2_li": Variant(_WIDE, (3, 4, 6, 3), linear=True),
    "pvt_v2_b3": Variant(_WIDE, (3, 4, 18, 3)),
    "pvt_v2_b4": Variant(_WIDE, (3, 8, 27, 3)),
    "pvt_v2_b5": Variant(_WIDE, (3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
})  # fmt: skip
