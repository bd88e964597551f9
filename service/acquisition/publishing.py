"""Weights and their description -> a checked model in the store: of a user's own checkpoint, or of a pulled file.

A published model has reference images beside its card, and the logits that plain float32 gives for them: its golden
outputs, which every backend and every later release must reproduce. `verify` repeats the same checks.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from service.acquisition.catalogue import IMAGENET, PREPROCESSOR_FILE, imagenet_labels, variant_named
from service.acquisition.preprocessing import PRESETS, PreprocessingOptions, describe, preprocessing, read_preprocessor
from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.variants import VARIANTS, Weights
from service.architecture.weights import State, load_into, open_checkpoint
from service.backends.base import Served, build, plain_logits
from service.errors import InvalidRequest, ServiceError, WeightsMismatch, WeightsNotFinite
from service.execution.reference import Reference, packed, reference_of, synthetic_images
from service.files import file_sha256, staging_folder, sync
from service.results import Floats
from service.store.cards import Accuracy, ModelCard, Origin, Preprocessing, WeightsFile
from service.store.folder import WEIGHTS_FILE, check_room, write_model, writing
from service.store.store import MODEL_ID, VERSION, Store, StoredModel, alias_target

PULL_FOLDER = ".pull"  # in the store: files that are being pulled
_PIXELS = 4 * 224 * 224  # of a batch
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_SHAPES = 4  # reference images with shapes on them
_BAR = 0.08  # half the height of a bar, as a share of the image's
_LABELS = TypeAdapter(tuple[str, ...])
_LABELS_BY_NUMBER = TypeAdapter(dict[int, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """The checkpoint `file` and its description; `variant` is a check, or None.

    `labels` is a file of them, or "imagenet", or None to number them.

    `weights` says which of several in it to take: see `service.architecture.weights.open_checkpoint`.
    """

    file: Path
    tag: str
    variant: str | None = None
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    weights: Weights | None = None
    labels: str | None = None
    licence: str = "unknown"
    source: str | None = None
    version: str | None = None


def import_model(root: Path, options: ImportOptions, on_choice: Callable[[str], None] = lambda _: None) -> StoredModel:
    """Put a checkpoint in any dialect into the store at `root`, with a card and reference outputs.

    `on_choice` is called with each choice that was made: which of several weights, whose preprocessing.

    Raises:
        InvalidRequest: variant, tag, version, labels or preprocessing are wrong; the message says which.
        WeightsInvalid, WeightsUnavailable: the file is not a model of that variant; the message says why.
        StoreNotWritable: the store can't be written.
    """
    expected, file = None if options.variant is None else variant_named(options.variant), options.file
    if expected is not None and expected not in VARIANTS:
        raise InvalidRequest(f"variant {options.variant!r}: it must be one of {', '.join(VARIANTS)}, or b0, b1, ...")
    if not MODEL_ID.fullmatch(f"{expected or next(iter(VARIANTS))}.{options.tag}"):
        raise InvalidRequest(f"tag {options.tag!r}: it has letters, digits, '-' and '_'")
    if options.version is not None and not VERSION.fullmatch(options.version):
        raise InvalidRequest(f"version {options.version!r}: it is a number from 1")
    labels = None if options.labels is None else _read_labels(options.labels)
    with writing(root):
        pass  # whether it can be written, before a large file is read
    checkpoint = open_checkpoint(file, variant=expected, weights=options.weights)
    variant, id_ = checkpoint.variant, f"{checkpoint.variant}.{options.tag}"
    with writing(root):
        if options.version is not None and os.path.lexists(root / id_ / options.version):
            raise InvalidRequest(f"{id_}@{options.version} is there already; leave --version out for the next one")
    if checkpoint.note:
        on_choice(checkpoint.note)
    preset, preprocessor = PRESETS[checkpoint.dialect], file.parent / PREPROCESSOR_FILE
    if checkpoint.dialect == "transformers" and os.path.lexists(preprocessor):
        preset = read_preprocessor(preprocessor)
    pixels = preprocessing(options.preprocessing, preset)
    on_choice(f"tensor names of {checkpoint.dialect}; images: {describe(pixels)}")
    source = options.source or file.name
    about = Description(
        id=id_, variant=variant, preprocessing=pixels, licence=options.licence, source=source, labels=labels
    )
    return publish(root, checkpoint.state, about, options.version)


def _read_labels(name: str) -> tuple[str, ...]:
    """The labels in a file: one a line, a JSON list, or a JSON object by class number such as `id2label`."""
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
            by_number = _LABELS_BY_NUMBER.validate_python(content.get("id2label", content))
            return tuple(by_number[i] for i in range(len(by_number)))
        return _LABELS.validate_python(content)
    except (ValueError, ValidationError, KeyError) as error:
        raise InvalidRequest(
            f"labels {name!r}: neither a JSON list of names nor an object with one for each number from 0"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Description:
    """The fields of a card that are not in the weights. `labels` None names each class after its number."""

    id: str
    variant: str
    preprocessing: Preprocessing
    licence: str
    source: str
    labels: Sequence[str] | None = None
    accuracy: Accuracy | None = None
    origin: Origin | None = None


def publish(root: Path, state: State, about: Description, version: str | None = None) -> StoredModel:
    """Put the model with the weights `state`, of official names, into the store at `root`.

    `version` None is the next one that is free. The folder appears whole or not at all.

    Raises:
        WeightsMismatch: the weights are not those of the variant, or have not one class for each label.
        WeightsNotFinite: they hold NaN or infinity, or give such logits.
        StoreNotWritable: the store can't be written; it is unchanged.
    """
    labels, pixels = _labels(state, about), about.preprocessing
    model = _loaded(state, about, len(labels))
    images = _reference_images(pixels.height, pixels.width)
    logits = _logits_in_batches(Served(model, pixels.mean, pixels.std).eval(), images)
    if not np.isfinite(logits).all():
        raise WeightsNotFinite(f"{about.source}: the model answers NaN or infinity to ordinary images")
    reference, reference_file = packed(Reference(images, logits))
    with writing(root):
        (root / PULL_FOLDER).mkdir(parents=True, exist_ok=True)
        check_room(root, sum(tensor.nbytes for tensor in state.values()) + len(reference))
        with staging_folder(root / PULL_FOLDER, "new-") as folder:
            weights = folder / WEIGHTS_FILE
            _save(state, weights)
            card = ModelCard(
                **vars(about) | {"labels": labels},
                weights=WeightsFile(file=WEIGHTS_FILE, sha256=file_sha256(weights), bytes=weights.stat().st_size),
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                reference=reference_file,
            )
            try:
                written = write_model(root, version, card, weights, {reference_file.file: reference})
            except BaseException:
                with suppress(OSError):  # a model's folder without a version would count as a broken model
                    (root / about.id).rmdir()
                raise
    return StoredModel(about.id, written.name, written, card)


def _save(state: State, path: Path) -> None:
    """Write with safetensors, which needs no copy in memory. Its own error for an OSError becomes that OSError.

    safetensors makes a file that only its owner may read; this one gets the mode that the umask gives.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(dict(state), path)
        path.chmod(mode)
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    sync(path)


def _labels(state: State, about: Description) -> tuple[str, ...]:
    """One label for each class of the head."""
    weight = state.get("head.weight")
    if weight is None or weight.ndim != 2:  # noqa: PLR2004  (classes, channels)
        raise WeightsMismatch(
            "the checkpoint has no classification head ('head.weight'); a backbone alone names nothing"
        )
    count = weight.shape[0]
    if count == 0:
        raise WeightsMismatch(f"{about.source}: the head has no classes, so there is nothing that it could name")
    if count == 1:
        raise WeightsMismatch(
            f"{about.source}: the head has one logit, of which a softmax always makes 1.0; make it two, since the "
            "softmax of (0, x) is the sigmoid of x: put a row of zeros before its weight and a zero before its bias "
            "(torch.cat([torch.zeros_like(weight), weight]), likewise bias), then import with two labels, no and yes"
        )
    labels = tuple(f"class {i}" for i in range(count)) if about.labels is None else tuple(about.labels)
    if len(labels) != count:
        raise WeightsMismatch(f"{len(labels)} labels for {count} classes; one label for each is needed")
    return labels


def _loaded(state: State, about: Description, classes: int) -> PVT_V2:
    """The model with these weights; where they are another variant's, the error names it."""
    with torch.device("meta"):
        model = create(about.variant, num_classes=classes)
    try:
        load_into(model, state, source=about.source)
    except WeightsMismatch as error:
        found = {name: tensor.shape for name, tensor in state.items()}
        for other in VARIANTS:
            with torch.device("meta"):
                expected = create(other, num_classes=classes).state_dict()
            if found == {name: tensor.shape for name, tensor in expected.items()}:
                raise WeightsMismatch(f"{about.source} holds {other}, not {about.variant}") from error
        raise
    return model


def _logits_in_batches(module: Served, images: NDArray[np.uint8]) -> Floats:
    """Logits (n, classes) of `images` by the plain module, a few at a time."""
    step = max(1, _PIXELS // (images.shape[1] * images.shape[2]))
    return np.concatenate([plain_logits(module, images[i : i + step]) for i in range(0, len(images), step)])


def _reference_images(height: int, width: int) -> NDArray[np.uint8]:
    """Images (n, height, width, 3) with the spectrum of photos, and as many of shapes, seeded and so always the same.

    The latter have discs, bars and chequers of random colours over a ramp between two others.
    """
    random = np.random.default_rng(1)
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    images = np.empty((_SHAPES, height, width, 3), np.uint8)
    for image in images:
        ramp = (np.cos(angle := random.uniform(0, np.pi)) * x + np.sin(angle) * y)[..., None]
        colours = random.uniform(0, 255, (8, 3))
        canvas = colours[0] + ramp * (colours[1] - colours[0]) / max(ramp.max() - ramp.min(), 1e-6)
        for colour in colours[2:5]:
            centre_y, centre_x, radius = random.uniform(0.1, 0.9), random.uniform(0.1, 0.9), random.uniform(0.05, 0.3)
            canvas[(y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2] = colour
        period = random.uniform(0.05, 0.2)
        bars = (np.floor(x / period) % 2 == 0) & (np.abs(y - random.uniform(0.2, 0.8)) < _BAR)
        chequers = (np.floor(x / period) + np.floor(y / period)) % 2 == 0
        corner = (x > random.uniform(0.5, 0.8)) & (y > random.uniform(0.5, 0.8))
        canvas[bars], canvas[chequers & corner] = colours[5], colours[6]
        image[:] = np.clip(canvas, 0, 255)
    return np.concatenate([synthetic_images(height, width), images])


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of checking `name`: `failure` says what is wrong with it, `note` what else there is to say."""

    name: str
    failure: str | None = None
    note: str = ""


def verify(root: Path) -> Iterator[Verdict]:
    """Check every version in the store at `root`, then its aliases; each verdict is yielded at once.

    Raises:
        WeightsUnavailable: the store can't be read.
    """
    contents = Store(root).contents()
    for versions in contents.versions.values():
        yield from map(_verify_model, versions)
    if contents.aliases_failure:
        yield Verdict("aliases", str(contents.aliases_failure))
    for alias, target in contents.aliases.items():
        id_, version = alias_target(target)
        if not any(version in {None, stored.version} for stored in contents.versions.get(id_, ())):
            yield Verdict(alias, f"the alias stands for {target!r}, which is not in the store")


def _verify_model(stored: StoredModel) -> Verdict:
    """Check digest and tensors of a version, and that plain float32 still gives the logits of its reference."""
    try:
        card = stored.require_card()
        module = build(card, stored.folder)
        reference = reference_of(card, stored.folder)
    except ServiceError as error:
        return Verdict(stored.key, str(error))
    if reference is None:
        return Verdict(stored.key, note="no reference outputs")
    deviation = reference.deviation(_logits_in_batches(module, reference.images))
    if objection := deviation.objection("float32"):
        return Verdict(stored.key, f"plain float32 does not give its reference outputs: {objection} ({deviation})")
    return Verdict(stored.key, note=f"{len(reference.images)} reference outputs reproduced")
