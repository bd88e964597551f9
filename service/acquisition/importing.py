"""A user's own checkpoint into the store."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from service.acquisition.catalogue import PREPROCESSOR_FILE, variant_named
from service.acquisition.labels import IMAGENET, imagenet_labels
from service.acquisition.preprocessing import PRESETS, Given, described, of_transformers, preprocessing
from service.acquisition.publishing import Description, publish
from service.architecture.variants import VARIANTS, Weights
from service.architecture.weights import PICKLES, Checkpoint, open_checkpoint
from service.errors import InvalidRequest, WeightsCorrupt
from service.store.cards import Preprocessing
from service.store.names import MODEL_ID, VERSION
from service.store.stored import StoredModel
from service.store.writes import writing

_LIST = TypeAdapter(tuple[str, ...])
_BY_NUMBER = TypeAdapter(dict[int, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """What is said of the checkpoint `file`; `labels` is a file of them, or "imagenet", or None to number them.

    `weights` says which of several in it to take: see `service.architecture.weights.open_checkpoint`.
    """

    file: Path
    variant: str
    tag: str
    given: Given = field(default_factory=Given)
    weights: Weights | None = None
    labels: str | None = None
    licence: str = "unknown"
    source: str | None = None
    version: str | None = None


def import_model(root: Path, asked: Import, tell: Callable[[str], None] = lambda _: None) -> StoredModel:
    """Put a checkpoint in any of the four dialects into the store at `root`, with a card and golden outputs.

    `tell` is called with what was chosen: which of several weights, whose preprocessing.

    Raises:
        InvalidRequest: variant, tag, version, labels or preprocessing are none; the message says which.
        WeightsInvalid, WeightsUnavailable: the file is not a model of that variant; the message says why.
        StoreNotWritable: the store can't be written.
    """
    about = _described(asked)
    with writing(root):
        taken = asked.version is not None and os.path.lexists(root / about.id / asked.version)
    if taken:
        raise InvalidRequest(f"{about.id}@{asked.version} is there already; leave --version out for the next one")
    checkpoint = open_checkpoint(asked.file, weights=asked.weights)
    if checkpoint.note:
        tell(checkpoint.note)
    pixels = preprocessing(asked.given, _preset(asked.file, checkpoint))
    tell(f"tensor names of {checkpoint.dialect}; images: {described(pixels)}")
    about = replace(about, preprocessing=pixels)
    return publish(root, checkpoint.state, about, asked.version)


def _preset(file: Path, checkpoint: Checkpoint) -> Preprocessing:
    """What the library does whose names the checkpoint has; of transformers' models a file beside them tells more."""
    beside = file.parent / PREPROCESSOR_FILE
    if checkpoint.dialect == "transformers" and os.path.lexists(beside):
        return of_transformers(beside)
    return PRESETS[checkpoint.dialect]


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
    if asked.file.suffix not in {".safetensors", *PICKLES}:
        raise WeightsCorrupt(f"{asked.file}: unknown format; it must end in .safetensors or .pth")
    return Description(
        id=id_,
        variant=variant,
        labels=None if asked.labels is None else read_labels(asked.labels),
        preprocessing=PRESETS["timm"],  # until it is known whose names the file has
        licence=asked.licence,
        source=asked.source or asked.file.name,
    )
