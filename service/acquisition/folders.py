"""A folder with a model in it, of transformers, of timm, or with a weights file alone: its files, and its shards."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
from huggingface_hub.repocard import metadata_load
from pydantic import BaseModel, ValidationError
from torch import Tensor

from service.acquisition.catalogue import PREPROCESSOR_FILE
from service.acquisition.configs import CONFIG_FILE, Config, read_config
from service.architecture.weights import read_content
from service.errors import InvalidRequest, WeightsCorrupt, WeightsUnavailable, reasons
from service.files import read_small

log = structlog.get_logger(component="import")

INDEX_SUFFIX = ".index.json"
CARD_FILE = "README.md"  # the hub's model card; its head is YAML and has the licence
MAX_INDEX_BYTES = 16_000_000
MAX_CARD_BYTES = 1_000_000
MAX_SHARDS = 1000
# The order of transformers' `from_pretrained`, then that of timm's `load_state_dict_from_path`, then its `train.py`.
PREFERRED = (
    "model.safetensors", f"model.safetensors{INDEX_SUFFIX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX_SUFFIX}",
    "pytorch_model.pth", "model.pth", "model_best.pth.tar",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".tar")
# Written beside the weights by the trainers of transformers and accelerate.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")


class _Index(BaseModel):
    """The index of shards that `huggingface_hub.save_torch_state_dict` writes."""

    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """The files of a folder: `weights` is a file or an index of shards; `left_aside` are weights that are not read."""

    weights: Path
    config: Config | None
    preprocessor: Path | None
    licence: str | None
    left_aside: tuple[str, ...]


def is_folder(path: Path) -> bool:
    """Whether it is read as a folder with a model: also an index of shards, whose folder it is."""
    return path.is_dir() or path.name.endswith(INDEX_SUFFIX)


def read_folder(path: Path) -> ModelFolder:
    """What the folder `path` has; `path` may be the index of shards in it.

    Raises:
        WeightsUnavailable: it can't be read, or has no weights.
        InvalidRequest, WeightsMismatch: its files contradict, or its config.json is of no model that can be served.
    """
    folder = path if path.is_dir() else path.parent
    try:
        names = {each.name for each in folder.iterdir() if each.is_file()}
    except OSError as error:
        raise WeightsUnavailable(f"{folder}: {error.strerror}; name a folder that can be read") from error
    chosen, others = (path.name, ()) if path != folder else weights_among(names, str(folder))
    return ModelFolder(
        weights=folder / chosen,
        config=read_config(folder / CONFIG_FILE) if CONFIG_FILE in names else None,
        preprocessor=folder / PREPROCESSOR_FILE if PREPROCESSOR_FILE in names else None,
        licence=_licence(folder / CARD_FILE) if CARD_FILE in names else None,
        left_aside=tuple(others),
    )


def weights_among(names: Collection[str], where: str) -> tuple[str, list[str]]:
    """The name of the weights, or of the index of their shards, among the `names` of a folder; and other weights.

    Raises:
        WeightsUnavailable: there are none; messages name the folder as `where`.
        InvalidRequest: there are several, and nothing tells which are meant.
    """
    found = sorted(
        name for name in names
        if name.endswith((*_SUFFIXES, *(suffix + INDEX_SUFFIX for suffix in _SUFFIXES)))
        and not name.startswith((*_NO_WEIGHTS, "."))
    )  # fmt: skip
    heads = [name for name in found if not _is_shard(name)]
    preferred = [name for name in PREFERRED if name in heads]
    indices = [name for name in heads if name.endswith(INDEX_SUFFIX)]
    candidates = preferred[:1] or (indices if len(indices) == 1 else heads)
    safe = [name for name in candidates if name.endswith(".safetensors")]
    if len({name.partition(".")[0] for name in candidates}) == 1 and len(safe) == 1:
        candidates = safe  # the same in two formats
    if len(candidates) == 1:
        others = [name for name in heads if name != candidates[0]]
        return candidates[0], others
    if candidates:
        raise InvalidRequest(f"{where} has several checkpoints: {', '.join(candidates)}; name the one that is meant")
    if found:
        raise WeightsUnavailable(
            f"{where} has shards ({found[0]}, ...) but not their index (such as model.safetensors{INDEX_SUFFIX}); "
            "copy that too"
        )
    listed = ", ".join(sorted(names)[:8]) or "nothing"
    raise WeightsUnavailable(f"{where} has no weights (*.safetensors, *.bin, *.pth, ...), but {listed}")


def _is_shard(name: str) -> bool:
    stem = name.partition(".")[0]
    return not name.endswith(INDEX_SUFFIX) and "-of-" in stem


def _licence(card: Path) -> str | None:
    """The licence in the model card; None where it says none that can be read."""
    try:
        read_small(card, MAX_CARD_BYTES, "model card")
        licence = (metadata_load(card) or {}).get("license")
    except Exception as error:  # noqa: BLE001  what people write there makes the parser raise almost anything
        log.warning("model_card_not_read", card=str(card), reason=str(error).partition("\n")[0])
        return None
    return licence if isinstance(licence, str) else None


def shards_in(index: Path) -> Mapping[str, str]:
    """The shard of each tensor, by the `index` of shards.

    Raises:
        WeightsUnavailable: the index can't be read.
        WeightsCorrupt: it is none, or names files outside its folder.
    """
    try:
        shards = _Index.model_validate_json(read_small(index, MAX_INDEX_BYTES, "index of shards")).weight_map
    except OSError as error:
        raise WeightsUnavailable(f"{index}: {error.strerror or error}") from error
    except ValidationError as error:
        raise WeightsCorrupt(f"{index}: no index of shards: {reasons(error)}; save the model again") from error
    for name in (files := set(shards.values())):
        if name in {"", ".", ".."} or {"/", "\\", "\0"} & set(name):
            raise WeightsCorrupt(f"{index}: it names the shard {name[:200]!r}, which is no file beside it; refused")
        if not name.endswith(_SUFFIXES):
            raise WeightsCorrupt(f"{index}: it names the shard {name[:200]!r}, which is no weights file; refused")
    if not 0 < len(files) <= MAX_SHARDS:
        raise WeightsCorrupt(f"{index}: it names {len(files)} shards, from 1 to {MAX_SHARDS} are read")
    return shards


def read_shards(index: Path) -> tuple[dict[str, Tensor], int]:
    """All tensors of a checkpoint in shards, whose `index` lies beside them, and how many bytes the shards have.

    Raises:
        WeightsUnavailable, WeightsCorrupt, WeightsUnsafe: a shard is missing or broken, or one has not the tensors that
            the index says.
    """
    shards = shards_in(index)
    files = sorted(set(shards.values()))
    if missing := [name for name in files if not (index.parent / name).is_file()]:
        raise WeightsUnavailable(
            f"{index}: {len(missing)} of {len(files)} shards are missing: {_listed(missing)}; copy them beside it"
        )
    state: dict[str, Tensor] = {}
    total = 0
    for file in files:
        content, size = read_content(index.parent / file)
        total += size
        if not isinstance(content, Mapping) or not all(isinstance(each, Tensor) for each in content.values()):
            raise WeightsCorrupt(f"{index.parent / file}: it is no shard, since it holds other things than tensors")
        if absent := [name for name, of in shards.items() if of == file and name not in content]:
            raise WeightsCorrupt(f"{index.parent / file}: it lacks {_listed(absent)}, which the index says it has")
        if foreign := [name for name in content if shards.get(name) != file]:
            raise WeightsCorrupt(
                f"{index.parent / file}: it has {_listed(foreign)}, which the index does not say; it is of another "
                "model, so copy index and shards again"
            )
        state |= content
    return state, total


def described(weights: Path) -> str:
    """The weights of a folder in words: format and, of shards, their number."""
    if not weights.name.endswith(INDEX_SUFFIX):
        return weights.name
    counts = Counter(shards_in(weights).values())
    return f"{weights.name} with {len(counts)} shard{'s' if len(counts) > 1 else ''}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")  # noqa: PLR2004
