"""A user's own checkpoint into the store."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from service.acquisition.catalogue import IMAGENET, PREPROCESSOR_FILE, imagenet_labels, variant_named
from service.acquisition.preprocessing import PRESETS, PreprocessingOptions, describe, preprocessing, read_preprocessor
from service.acquisition.publishing import Description, publish
from service.architecture.variants import VARIANTS, Weights
from service.architecture.weights import PICKLES, Checkpoint, open_checkpoint
from service.errors import InvalidRequest, WeightsCorrupt
from service.store.cards import Preprocessing
from service.store.folder import writing
from service.store.store import MODEL_ID, VERSION, StoredModel

_LIST = TypeAdapter(tuple[str, ...])
_BY_NUMBER = TypeAdapter(dict[int, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """The checkpoint `file` and its description; `labels` is a file of them, or "imagenet", or None to number them.

    `weights` says which of several in it to take: see `service.architecture.weights.open_checkpoint`.
    """

    file: Path
    variant: str
    tag: str
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    weights: Weights | None = None
    labels: str | None = None
    licence: str = "unknown"
    source: str | None = None
    version: str | None = None


def import_model(root: Path, options: ImportOptions, on_choice: Callable[[str], None] = lambda _: None) -> StoredModel:
    """Put a checkpoint in any of the four dialects into the store at `root`, with a card and reference outputs.

    `on_choice` is called with each choice that was made: which of several weights, whose preprocessing.

    Raises:
        InvalidRequest: variant, tag, version, labels or preprocessing are wrong; the message says which.
        WeightsInvalid, WeightsUnavailable: the file is not a model of that variant; the message says why.
        StoreNotWritable: the store can't be written.
    """
    about = _description(options)
    with writing(root):
        taken = options.version is not None and os.path.lexists(root / about.id / options.version)
    if taken:
        raise InvalidRequest(f"{about.id}@{options.version} is there already; leave --version out for the next one")
    checkpoint = open_checkpoint(options.file, weights=options.weights)
    if checkpoint.note:
        on_choice(checkpoint.note)
    pixels = preprocessing(options.preprocessing, _preset(options.file, checkpoint))
    on_choice(f"tensor names of {checkpoint.dialect}; images: {describe(pixels)}")
    return publish(root, checkpoint.state, replace(about, preprocessing=pixels), options.version)


def _preset(file: Path, checkpoint: Checkpoint) -> Preprocessing:
    """The preprocessing of the library whose names the checkpoint has, or that in transformers' file beside it."""
    preprocessor = file.parent / PREPROCESSOR_FILE
    if checkpoint.dialect == "transformers" and os.path.lexists(preprocessor):
        return read_preprocessor(preprocessor)
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


def _description(options: ImportOptions) -> Description:
    variant = variant_named(options.variant)
    if variant not in VARIANTS:
        raise InvalidRequest(f"variant {options.variant!r}: it must be one of {', '.join(VARIANTS)}, or b0, b1, ...")
    id_ = f"{variant}.{options.tag}"
    if not MODEL_ID.fullmatch(id_):
        raise InvalidRequest(f"tag {options.tag!r}: it has letters, digits, '-' and '_'")
    if options.version is not None and not VERSION.fullmatch(options.version):
        raise InvalidRequest(f"version {options.version!r}: it is a number from 1")
    if options.file.suffix not in {".safetensors", *PICKLES}:
        raise WeightsCorrupt(f"{options.file}: unknown format; it must end in .safetensors or .pth")
    return Description(
        id=id_,
        variant=variant,
        labels=None if options.labels is None else read_labels(options.labels),
        preprocessing=PRESETS["timm"],  # until it is known whose names the file has
        licence=options.licence,
        source=options.source or options.file.name,
    )
