"""Weights and their description -> a checked model in the store.

A published model has reference images beside its card, and the logits that plain float32 gives for them: its golden
outputs, which every backend and every later release must reproduce. `verify` repeats the same checks.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError

from service.acquisition.proof import own_logits
from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.variants import VARIANTS
from service.architecture.weights import Checkpoint, State, load_into
from service.backends.base import Served, build, plain_logits
from service.errors import InvalidRequest, ServiceError, WeightsMismatch, WeightsNotFinite, reasons
from service.execution.reference import Reference, packed, reference_of, synthetic_images
from service.files import file_sha256, staging_folder, sync
from service.results import Floats
from service.store.cards import (
    Accuracy,
    Answers,
    ModelCard,
    Origin,
    Preprocessing,
    ReferenceFile,
    WeightsFile,
)
from service.store.folder import WEIGHTS_FILE, check_room, write_model, writing
from service.store.store import Store, StoredModel, alias_target

PULL_FOLDER = ".pull"  # in the store: files that are being pulled
_PIXELS = 4 * 224 * 224  # of a batch
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_SHAPES = 4  # reference images with shapes on them
_NOT_GEOMETRY = "height", "width", "mean", "std", "colours"  # of a card's preprocessing
_BAR = 0.08  # half the height of a bar, as a share of the image's


@dataclass(frozen=True, kw_only=True)
class Description:
    """The fields of a card that are not in the weights.

    `labels` None names each class after its number. `answers` None says nothing of them: a softmax, where there are
    several logits.
    """

    id: str
    variant: str
    preprocessing: Preprocessing
    licence: str
    source: str
    labels: Sequence[str] | None = None
    answers: Answers | None = None
    accuracy: Accuracy | None = None
    training: str | None = None
    origin: Origin | None = None


def publish(
    root: Path,
    state: State,
    about: Description,
    version: str | None = None,
    beside: Mapping[str, bytes] = MappingProxyType({}),
    *,
    checkpoint: Checkpoint | None = None,
    on_note: Callable[[str], None] = lambda _: None,
) -> StoredModel:
    """Put the model with the weights `state`, of official names, into the store at `root`.

    Without `head.weight` and `head.bias` in it, it is a model without a head. `version` None is the next one that is
    free. The folder appears whole or not at all. `beside` are other files in it, by name. `checkpoint` is what the
    state was converted from: the model, read again from its new file, must answer as that does, and `on_note` is called
    with how close it comes.

    Raises:
        WeightsMismatch: the weights are not those of the variant, have not one class for each label, or do not answer
            as the checkpoint does.
        WeightsNotFinite: they hold NaN or infinity, or give such logits.
        InvalidRequest: answers of that kind can't be made of these logits.
        StoreNotWritable: the store can't be written; it is unchanged.
    """
    labels = labels_for(state, about)
    model = _loaded(state, about, len(labels))
    reference, reference_file = packed(outputs := _reference(model, about, embeddings=not labels))
    with writing(root):
        (root / PULL_FOLDER).mkdir(parents=True, exist_ok=True)
        check_room(root, sum(map(len, beside.values())) + sum(each.nbytes for each in state.values()) + len(reference))
        with staging_folder(root / PULL_FOLDER, "new-") as folder:
            weights = folder / WEIGHTS_FILE
            _save(state, weights)
            card = _card(about, labels, model, weights, reference_file)
            if checkpoint:
                on_note(_proof(card, folder, outputs.images, checkpoint))
            files = {reference_file.file: reference, **beside}
            with _without_empty_folder(root / about.id):
                written = write_model(root, version, card, weights, files)
    return StoredModel(about.id, written.name, written, card)


@contextmanager
def _without_empty_folder(folder: Path) -> Iterator[None]:
    """Where what runs inside fails, remove the folder if it is empty: it would count as a broken model."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def _reference(model: PVT_V2, about: Description, *, embeddings: bool) -> Reference:
    """Reference images and what plain float32 gives for them; raises WeightsNotFinite where that is no number."""
    pixels = about.preprocessing
    images = _reference_images(pixels.height, pixels.width)
    outputs = _logits_in_batches(Served(model, pixels.mean, pixels.std, colours=pixels.colours).eval(), images)
    if not np.isfinite(outputs).all():
        raise WeightsNotFinite(f"{about.source}: the model answers NaN or infinity to ordinary images")
    return Reference(images, outputs, embeddings=embeddings)


def _card(
    about: Description, labels: Sequence[str], model: PVT_V2, weights: Path, reference: ReferenceFile
) -> ModelCard:
    """Raises InvalidRequest if labels and answers do not go together."""
    fields = vars(about) | {"labels": labels} | dict(about.answers or Answers())
    del fields["answers"]
    try:
        return ModelCard(
            **fields,
            weights=WeightsFile(file=WEIGHTS_FILE, sha256=file_sha256(weights), bytes=weights.stat().st_size),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            reference=reference,
        )
    except ValidationError as error:
        raise InvalidRequest(f"{about.source}: {reasons(error, 'card')}") from error


def publish_prepared(root: Path, stored: StoredModel, pixels: Preprocessing) -> StoredModel:
    """Put `stored`, a version in the store at `root`, into it again as the next one, with the preprocessing `pixels`.

    That may differ in geometry only: reference images are already what a geometry leads to, and stay as they are.

    Raises:
        InvalidRequest: `pixels` have another size, mean, std or order of colours.
        StoreNotWritable: the store can't be written; it is unchanged.
    """
    card = stored.require_card()
    if any(getattr(pixels, name) != getattr(card.preprocessing, name) for name in _NOT_GEOMETRY):
        raise InvalidRequest(
            f"{stored.key}: another size, mean, std or order of colours needs the checkpoint; import it again"
        )
    new = card.model_copy(update={"preprocessing": pixels, "accuracy": None})  # which was measured with the other one
    others = {card.reference.file: (stored.folder / card.reference.file).read_bytes()} if card.reference else {}
    with writing(root):
        (root / PULL_FOLDER).mkdir(parents=True, exist_ok=True)
        check_room(root, card.weights.bytes)
        with staging_folder(root / PULL_FOLDER, "new-") as folder:
            weights = Path(shutil.copyfile(stored.folder / card.weights.file, folder / card.weights.file))
            sync(weights)
            written = write_model(root, None, new, weights, others)
    return StoredModel(stored.id, written.name, written, new)


def _proof(card: ModelCard, folder: Path, images: NDArray[np.uint8], checkpoint: Checkpoint) -> str:
    """How close the model in `folder` comes to what its checkpoint itself answers; raises WeightsMismatch if not."""
    pixels = card.preprocessing
    seen = images[..., ::-1] if pixels.colours == "bgr" else images
    own = own_logits(
        checkpoint.source, checkpoint.dialect, VARIANTS[card.variant], seen, mean=pixels.mean, std=pixels.std
    )
    reference = Reference(images, own.astype(np.float32), embeddings=not card.labels)
    deviation = reference.deviation(_logits_in_batches(build(card, folder), images))
    if objection := deviation.objection("float32"):
        raise WeightsMismatch(
            f"{card.source}: what was converted does not answer as the checkpoint itself does: {objection} "
            f"({deviation}); nothing was imported, and this is a fault of the conversion: please report it"
        )
    return (
        f"proof: on {len(images)} images the stored model's outputs are off by {deviation.relative:.1e} of the "
        "greatest from the checkpoint's own, computed in float64 from its tensors under their names in "
        f"{checkpoint.dialect}"
    )


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


def labels_for(state: State, about: Description) -> tuple[str, ...]:
    """One label for each class of the head; none where the checkpoint has no head."""
    weight, labels = state.get("head.weight"), about.labels
    named = f"{len(labels)} labels, from {labels[0]!r} to {labels[-1]!r}" if labels else "labels"
    if weight is None:
        if labels:
            raise WeightsMismatch(
                f"{about.source}: it has no classification head ('head.weight'), and {named}, were given; leave "
                "--labels out, and the model computes embeddings, or save the model with its head"
            )
        return ()
    if weight.ndim != 2:  # noqa: PLR2004  (classes, channels)
        shape = tuple(weight.shape)
        raise WeightsMismatch(f"{about.source}: 'head.weight' is {shape} and must be (classes, channels)")
    count = weight.shape[0]
    if count == 0:
        raise WeightsMismatch(f"{about.source}: the head has no classes, so there is nothing that it could name")
    if count == 1 and (about.answers or Answers()).activation == "softmax":
        raise WeightsMismatch(
            f"{about.source}: the head has one logit, of which a softmax always makes 1.0; say what the logit is: add "
            "--activation sigmoid where it was trained with a binary cross-entropy, or --activation none where it is a "
            "number to answer with as it is"
        )
    if labels is not None and len(labels) != count:
        classes = f"{count} classes" if count > 1 else "one class"
        raise WeightsMismatch(f"{about.source}: the head has {classes}, and there are {named}; give one for each class")
    return tuple(f"class {i}" for i in range(count)) if labels is None else tuple(labels)


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
