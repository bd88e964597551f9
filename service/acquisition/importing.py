"""A user's own checkpoint into the store."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from service.acquisition.catalogue import variant_named
from service.acquisition.labels import IMAGENET, imagenet_labels
from service.acquisition.publishing import Description, publish
from service.architecture.variants import VARIANTS
from service.architecture.weights import read_checkpoint
from service.errors import InvalidRequest, WeightsCorrupt
from service.store.cards import Preprocessing
from service.store.names import MODEL_ID, VERSION
from service.store.stored import StoredModel

_LIST = TypeAdapter(tuple[str, ...])
_BY_NUMBER = TypeAdapter(dict[int, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """What is said of the checkpoint `file`; `labels` is a file of them, or "imagenet", or None to number them."""

    file: Path
    variant: str
    tag: str
    preprocessing: Preprocessing
    labels: str | None = None
    licence: str = "unknown"
    source: str | None = None
    version: str | None = None


def import_model(root: Path, asked: Import) -> StoredModel:
    """Put a checkpoint in any of the four dialects into the store at `root`, with a card and golden outputs.

    Raises:
        InvalidRequest: variant, tag, version or labels are none; the message says which.
        WeightsInvalid, WeightsUnavailable: the file is not a model of that variant; the message says why.
        StoreNotWritable: the store can't be written.
    """
    about = _described(asked)
    if asked.version is not None and (root / about.id / asked.version).exists():
        raise InvalidRequest(f"{about.id}@{asked.version} is there already; leave --version out for the next one")
    return publish(root, read_checkpoint(asked.file), about, asked.version)


def read_labels(name: str) -> tuple[str, ...]:
    """The labels in a file: one a line, a JSON list, or a JSON object by class number such as `id2label`.

    Raises:
        InvalidRequest: there is no such file, or it is none of these.
    """
    if name == IMAGENET:
        return imagenet_labels()
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"labels {name!r}: {getattr(error, 'strerror', None) or error}") from error
    if not name.endswith(".json"):
        return tuple(line.strip() for line in text.rstrip().splitlines())
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            by_number = _BY_NUMBER.validate_python(content.get("id2label", content))
            return tuple(by_number[i] for i in range(len(by_number)))
        return _LIST.validate_python(content)
    except (ValueError, ValidationError, KeyError) as error:
        raise InvalidRequest(
            f"labels {name!r}: neither a JSON list of names nor an object with one for each number from 0"
        ) from error


def _described(asked: Import) -> Description:
    variant = variant_named(asked.variant)
    if variant not in VARIANTS:
        raise InvalidRequest(f"variant {asked.variant!r}: it must be one of {', '.join(VARIANTS)}, or b0, b1, ...")
    id_ = f"{variant}.{asked.tag}"
    if not MODEL_ID.fullmatch(id_):
        raise InvalidRequest(f"tag {asked.tag!r}: it has letters, digits, '-' and '_'")
    if asked.version is not None and not VERSION.fullmatch(asked.version):
        raise InvalidRequest(f"version {asked.version!r}: it is a number from 1")
    if asked.file.suffix not in {".safetensors", ".pth", ".pt", ".bin"}:
        raise WeightsCorrupt(f"{asked.file}: unknown format; it must end in .safetensors or .pth")
    return Description(
        id=id_,
        variant=variant,
        labels=None if asked.labels is None else read_labels(asked.labels),
        preprocessing=asked.preprocessing,
        licence=asked.licence,
        source=asked.source or asked.file.name,
    )
