"""The names that five libraries give to the tensors of PVT-v2, and how they split or join them.

They are those of the authors' repository (`official`), timm, lucid (timm's, but for the head), transformers, and
mmdetection's `PyramidVisionTransformerV2`, which joins query, key and value in `in_proj_weight`.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from service.architecture.variants import Dialect

HEADS: Mapping[Dialect, str] = MappingProxyType(
    {"official": "head", "timm": "head", "lucid": "classifier", "transformers": "classifier", "mmdetection": "head"}
)  # each library's name of the head
SITE = re.compile(
    r"(?P<before>(?:.*?\.)??)(?:"
    r"patch_embed(?P<embed>[1-4])|block(?P<block>[1-4])\.(?P<at>\d+)|norm(?P<norm>[1-4])"
    r"|(?P<timm>patch_embed|stages[._](?P<stage>[0-3])\.(?:downsample|norm|blocks\.(?P<timm_at>\d+)))"
    r"|(?P<hf>encoder\.layers\.(?P<hf_stage>[0-3])\.(?:patch_embedding|layer_norm|blocks\.(?P<hf_at>\d+)))"
    r"|(?P<mm>layers\.(?P<mm_stage>[0-3])\.(?:0|2|1\.(?P<mm_at>\d+)))"
    r")(?P<layer>(?:\.[\w.]+?)?)[._](?P<kind>weight|bias)"
)
EMBED_LAYERS = {".proj": "proj", ".norm": "norm", ".layer_norm": "norm", ".projection": "proj"}
BLOCK_LAYERS = {
    **{f".{name}": name for name in ("norm1", "norm2", "attn.q", "attn.kv", "attn.proj", "attn.sr", "attn.norm")},
    ".mlp.fc1": "mlp.fc1", ".mlp.fc2": "mlp.fc2", ".mlp.dwconv": "mlp.dwconv.dwconv",
    ".mlp.dwconv.dwconv": "mlp.dwconv.dwconv", ".layer_norm_1": "norm1", ".layer_norm_2": "norm2",
    ".attention.query": "attn.q", ".attention.key": "attn.k", ".attention.value": "attn.v",
    ".attention.proj": "attn.proj", ".attention.spatial_reduction": "attn.sr", ".attention.layer_norm": "attn.norm",
    ".mlp.dense1": "mlp.fc1", ".mlp.dense2": "mlp.fc2", ".attn.attn.in_proj": "attn.qkv",
    ".attn.attn.out_proj": "attn.proj", ".ffn.layers.0": "mlp.fc1", ".ffn.layers.1": "mlp.dwconv.dwconv",
    ".ffn.layers.4": "mlp.fc2",
}  # fmt: skip


def official_name(name: str) -> tuple[str, str, Dialect] | None:
    """What stands before it, official name (also `attn.k`, `attn.v`, `attn.qkv`) and dialect of a backbone's tensor."""
    if (at := SITE.fullmatch(name)) is None:
        return None
    dialect: Dialect = (
        "timm" if at["timm"] else "transformers" if at["hf"] else "mmdetection" if at["mm"] else "official"
    )
    stage = (
        at["embed"] or at["block"] or at["norm"] or str(int(at["stage"] or at["hf_stage"] or at["mm_stage"] or 0) + 1)
    )
    block = at["at"] or at["timm_at"] or at["hf_at"] or at["mm_at"]
    site = name[len(at["before"]) :]
    if block is not None:
        layer, path = BLOCK_LAYERS.get(at["layer"]), f"block{stage}.{block}"
    elif at["norm"] or re.match(r"stages[._]\d\.norm|encoder\.layers\.\d\.layer_norm|layers\.\d\.2", site):
        return (at["before"], f"norm{stage}.{at['kind']}", dialect) if not at["layer"] else None
    else:
        layer, path = EMBED_LAYERS.get(at["layer"]), f"patch_embed{stage}"
    return None if layer is None else (at["before"], f"{path}.{layer}.{at['kind']}", dialect)


def own_name(name: str) -> str:
    """The name of a backbone's tensor in its library's own model: without what stands before it."""
    found = official_name(name)
    return re.sub(r"^stages_(?=\d)", "stages.", name[len(found[0]) :] if found else name)


def joined(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under official names, of which query, key and value may be split or joined otherwise."""
    state = {}
    for name, tensor in parts.items():
        if ".attn.k." in name and (value := name.replace(".attn.k.", ".attn.v.")) in parts:
            state[name.replace(".attn.k.", ".attn.kv.")] = torch.cat([tensor, parts[value]])
        elif ".attn.qkv." in name:
            third = tensor.shape[0] // 3
            state[name.replace(".attn.qkv.", ".attn.q.")] = tensor[:third]
            state[name.replace(".attn.qkv.", ".attn.kv.")] = tensor[third:]
        elif ".mlp.fc" in name and tensor.ndim == 4:  # noqa: PLR2004  a 1 x 1 convolution
            state[name] = tensor.flatten(1)
        elif ".attn.v." not in name or name.replace(".attn.v.", ".attn.k.") not in parts:
            state[name] = tensor
    return state
