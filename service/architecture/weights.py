"""A checkpoint file in any public dialect -> the model's own `state_dict`.

The model speaks the official repository's names. The other dialects are timm's (its `models/pvt_v2.py`), lucid's (its
`models/vision/pvt/_model.py`: timm's names, with `classifier` for `head`) and Hugging Face transformers' (its
`models/pvt_v2/modeling_pvt_v2.py`), which also splits `kv` into a key and a value.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from service.architecture.checkpoints import Checkpoint, checkpoint_of
from service.architecture.pickles import FETCH_AGAIN, parse
from service.architecture.variants import Weights
from service.errors import (
    WeightsCorrupt,
    WeightsDigestMismatch,
    WeightsMismatch,
    WeightsNotFinite,
    WeightsUnavailable,
)

__all__ = [
    "Checkpoint",
    "State",
    "checkpoint_of",
    "load_into",
    "load_weights",
    "open_checkpoint",
    "read_checkpoint",
    "read_content",
    "remap_keys",
]

State = Mapping[str, Tensor]

LISTED = 8  # names in a message, at most
WRAPPERS = ("model", "state_dict")  # names under which training scripts keep the weights
MAX_DEPTH = 8  # of wrappers in one another; a pickle may hold itself

FOREIGN = re.compile(r"^(patch_embed|stages|classifier|pvt_v2|encoder)\.")
STAGE_PART = re.compile(r"^(?:pvt_v2\.)?(?:stages|encoder\.layers)\.(\d+)\.([a-z_]+)\.")
STAGE_PARTS = {"downsample": "patch_embed", "patch_embedding": "patch_embed", "blocks": "block", "layer_norm": "norm"}
RENAMES = (
    (re.compile(r"^patch_embed\."), "patch_embed1."),
    (re.compile(r"^classifier\."), "head."),
    (re.compile(r"\.attention\."), ".attn."),
    (re.compile(r"\.query\."), ".q."),
    (re.compile(r"\.spatial_reduction\."), ".sr."),
    (re.compile(r"\.layer_norm\."), ".norm."),
    (re.compile(r"\.layer_norm_([12])\."), r".norm\1."),
    (re.compile(r"\.dense([12])\."), r".fc\1."),
    (re.compile(r"\.mlp\.dwconv\.(?=weight$|bias$)"), ".mlp.dwconv.dwconv."),
)


def _official(name: str) -> str:
    name = STAGE_PART.sub(lambda part: f"{STAGE_PARTS.get(part[2], part[2])}{int(part[1]) + 1}.", name)
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _joined_keys_and_values(state: State) -> dict[str, Tensor]:
    """Replace each pair `attn.key`, `attn.value` by one `attn.kv`, keys first."""
    joined = {}
    for name, tensor in state.items():
        value = state.get(name.replace(".attn.key.", ".attn.value."))
        if ".attn.key." in name and value is not None and value.shape == tensor.shape:
            joined[name.replace(".attn.key.", ".attn.kv.")] = torch.cat([tensor, value])
        elif not (".attn.value." in name and name.replace(".attn.value.", ".attn.key.") in state):
            joined[name] = tensor
    return joined


def remap_keys(state: State) -> dict[str, Tensor]:
    """The same tensors under official names; raises WeightsMismatch where two end up with one name."""
    if state and all(name.startswith("module.") for name in state):  # left by DistributedDataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if not any(FOREIGN.match(name) for name in state):
        return dict(state)
    names = Counter(map(_official, state))
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise WeightsMismatch(f"dialects are mixed: more than one tensor would be {_listed(twice)}")
    return _joined_keys_and_values(dict(zip(names, state.values(), strict=True)))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _trained(content: object) -> object:
    """The trained weights in `content`, under `model` or `state_dict`.

    `EMAHook` of mmengine swaps them and their average; a counter under `ema_state_dict` shows that it did.
    """
    swapped = content.get("ema_state_dict") if isinstance(content, Mapping) else None
    if isinstance(swapped, Mapping) and "steps" in swapped:
        content = {name: tensor for name, tensor in swapped.items() if name != "steps"}
    for _ in range(MAX_DEPTH):
        if isinstance(content, Mapping):
            content = next((inner for key in WRAPPERS if isinstance(inner := content.get(key), Mapping)), content)
    if isinstance(content, Mapping):  # torch's `AveragedModel` counts beside its tensors
        return {name: tensor for name, tensor in content.items() if name != "n_averaged"}
    return content


def _tensors(path: Path, content: object, limit: int) -> dict[str, Tensor]:
    """The float32 state dict in `content`, none of whose tensors has more than `limit` elements, or WeightsCorrupt."""
    if not isinstance(content, Mapping) or not content:
        raise WeightsCorrupt(f"{path}: holds no tensors; save the model's state_dict()")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise WeightsCorrupt(f"{path}: {name!r} is {type(tensor).__name__}; save the model's state_dict() alone")
        if not tensor.is_floating_point() or tensor.is_sparse or tensor.is_meta or tensor.numel() > limit:
            raise WeightsCorrupt(f"{path}: {name!r}, {tensor.dtype}, is no dense floating-point tensor; {FETCH_AGAIN}")
    return {str(name): tensor.detach().float().contiguous() for name, tensor in content.items()}


def _read(path: Path, sha256: str | None) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsUnavailable(f"{path}: {error.strerror or error}; pull the model or correct its card") from error
    actual = hashlib.sha256(data).hexdigest() if sha256 else sha256
    if actual != sha256:
        raise WeightsDigestMismatch(f"{path}: SHA-256 is {actual}, expected {sha256}; {FETCH_AGAIN}")
    if not data:
        raise WeightsCorrupt(f"{path}: the file is empty; {FETCH_AGAIN}")
    return data


def read_content(path: Path) -> tuple[object, int]:
    """What is in the file at `path`, not looked into any further, and how many bytes it has; code in it never runs.

    Raises:
        WeightsUnavailable, WeightsCorrupt, WeightsUnsafe: as `open_checkpoint`.
    """
    data = _read(path, None)
    return parse(path, data), len(data)


def open_checkpoint(
    path: Path, *, variant: str | None = None, weights: Weights | None = None, backbone: bool = False
) -> Checkpoint:
    """The model in a checkpoint as its trainer wrote it, of any name: see `checkpoint_of`.

    Raises:
        WeightsUnavailable: there is no such file, or no permission to read it.
        WeightsCorrupt: truncated, of another format, or without tensors.
        WeightsUnsafe: a pickle with other classes than harmless data, which did not run; the message names one.
        WeightsMismatch: as `checkpoint_of`.
    """
    content, size = read_content(path)
    return checkpoint_of(content, str(path), variant=variant, weights=weights, backbone=backbone, limit=size)


def read_checkpoint(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The trained weights in a file that a card names, float32 on the CPU, under official names. It is read once.

    The state dict in a .pth file may lie under `model` or `state_dict`, which is what such a file has always meant; an
    average beside it is left aside. `sha256` is what the file's bytes must hash to, in hexadecimal.

    Raises:
        WeightsUnavailable: there is no such file, or no permission to read it.
        WeightsDigestMismatch: the bytes are others than `sha256` says.
        WeightsCorrupt: truncated, of another format, or with more in it than floating-point tensors.
        WeightsUnsafe: a pickle with code in it, which did not run.
        WeightsMismatch: a mixture of dialects.
    """
    data = _read(path, sha256)
    state = _tensors(path, _trained(parse(path, data)), limit=len(data))
    try:
        return remap_keys(state)
    except WeightsMismatch as error:
        raise WeightsMismatch(f"{path}: {error}; {FETCH_AGAIN}") from error


def load_into(model: nn.Module, state: State, *, source: str = "the checkpoint") -> None:
    """Put all of `state`, of official names, into `model`, whose tensors it replaces if they are on the meta device.

    Raises:
        WeightsMismatch: tensors are missing, unexpected or misshapen; the model is left as it was.
        WeightsNotFinite: a tensor holds NaN or infinity; likewise. Messages name the `source`.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [f"{n} {found[n]} for {size}" for n, size in expected.items() if found.get(n, size) != size],
    }
    problems = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        advice = "compare the card's variant and number of labels with the file"
        raise WeightsMismatch(f"{source} does not fit the model: {'; '.join(problems)}; {advice}")
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise WeightsNotFinite(f"{source}: {name} holds NaN or infinity; {FETCH_AGAIN}")
    model.load_state_dict(state, assign=any(parameter.is_meta for parameter in model.parameters()))


def load_weights(model: nn.Module, path: Path, sha256: str | None = None) -> None:
    """Read `path` into `model`.

    Raises:
        WeightsUnavailable, WeightsInvalid: as `read_checkpoint` and `load_into`.
    """
    load_into(model, read_checkpoint(path, sha256=sha256), source=str(path))
