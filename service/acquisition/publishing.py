"""Weights and their description -> a checked model in the store; and the same checks of every model in a store.

A published model has reference images beside its card, and the logits that plain float32 gives for them: its golden
outputs, which every backend and every later release must reproduce.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.variants import VARIANTS
from service.architecture.weights import State, load_into
from service.backends.module import Served, build, plain_logits
from service.errors import ServiceError, WeightsMismatch, WeightsNotFinite
from service.execution.reference import Reference, packed, reference_of, synthetic_images
from service.files import file_sha256, staging_folder, sync
from service.results import Floats
from service.store.cards import Accuracy, ModelCard, Origin, Preprocessing, WeightsFile
from service.store.changes import WEIGHTS_FILE, write_model
from service.store.folder import check_room, writing
from service.store.names import alias_target
from service.store.store import Contents, Store, StoredModel

PULL_FOLDER = ".pull"  # in the store: files that are being pulled
_PIXELS = 4 * 224 * 224  # of a batch
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_SHAPES = 4  # reference images with shapes on them
_BAR = 0.08  # half the height of a bar, as a share of the image's


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The part of a card that is not in the weights. `labels` None names each class after its number."""

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
    labels = _labels(state, about)
    with torch.device("meta"):
        model = create(about.variant, num_classes=len(labels))
    _load(model, state, about)
    reference, reference_file = packed(_reference(model, about.preprocessing, about.source))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    with writing(root), _no_empty_folder(root / about.id):
        (root / PULL_FOLDER).mkdir(parents=True, exist_ok=True)
        check_room(root, size + len(reference))
        with staging_folder(root / PULL_FOLDER, "new-") as folder:
            weights = folder / WEIGHTS_FILE
            _save(state, weights)
            card = ModelCard(
                id=about.id,
                variant=about.variant,
                labels=labels,
                preprocessing=about.preprocessing,
                weights=WeightsFile(file=WEIGHTS_FILE, sha256=file_sha256(weights), bytes=weights.stat().st_size),
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                licence=about.licence,
                source=about.source,
                reference=reference_file,
                accuracy=about.accuracy,
                origin=about.origin,
            )
            written = write_model(root, version, card, weights, {reference_file.file: reference})
    return StoredModel(about.id, written.name, written, card)


@contextmanager
def _no_empty_folder(model: Path) -> Iterator[None]:
    """Remove a model's folder without a version, which a failed write may leave: it would count as a broken model."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            model.rmdir()
        raise


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


def classes(state: State) -> int:
    """How many classes the head of a checkpoint has.

    Raises:
        WeightsMismatch: it has no head.
    """
    weight = state.get("head.weight")
    if weight is None or weight.ndim != 2:  # noqa: PLR2004  (classes, channels)
        raise WeightsMismatch(
            "the checkpoint has no classification head ('head.weight'); a backbone alone names nothing"
        )
    return int(weight.shape[0])


def _labels(state: State, about: Description) -> tuple[str, ...]:
    count = classes(state)
    if count == 0:
        raise WeightsMismatch(f"{about.source}: the head has no classes, so there is nothing that it could name")
    if count == 1:
        raise WeightsMismatch(
            f"{about.source}: the head has one logit, of which a softmax always makes 1.0; make it two, since the "
            "softmax of (0, x) is the sigmoid of x: put a row of zeros before its weight and a zero before its bias "
            "(torch.cat([torch.zeros_like(weight), weight]), likewise bias), then import with two labels, no and yes"
        )
    if about.labels is None:
        return tuple(f"class {i}" for i in range(count))
    if len(about.labels) != count:
        raise WeightsMismatch(f"{len(about.labels)} labels for {count} classes; one label for each is needed")
    return tuple(about.labels)


def _load(model: PVT_V2, state: State, about: Description) -> None:
    """`load_into`; where the weights are another variant's, the error names it."""
    try:
        load_into(model, state, source=about.source)
    except WeightsMismatch as error:
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for other in VARIANTS:
            with torch.device("meta"):
                expected = create(other, num_classes=classes(state)).state_dict()
            if found == {name: tuple(tensor.shape) for name, tensor in expected.items()}:
                raise WeightsMismatch(f"{about.source} holds {other}, not {about.variant}") from error
        raise


def _reference(model: PVT_V2, pixels: Preprocessing, source: str) -> Reference:
    images = reference_images(pixels.height, pixels.width)
    logits = _logits_in_batches(Served(model, pixels.mean, pixels.std).eval(), images)
    if not np.isfinite(logits).all():
        raise WeightsNotFinite(f"{source}: the model answers NaN or infinity to ordinary images")
    return Reference(images, logits)


def _logits_in_batches(module: Served, images: NDArray[np.uint8]) -> Floats:
    """Logits (n, classes) of `images` by the plain module, a few at a time."""
    step = max(1, _PIXELS // (images.shape[1] * images.shape[2]))
    return np.concatenate([plain_logits(module, images[i : i + step]) for i in range(0, len(images), step)])


def reference_images(height: int, width: int) -> NDArray[np.uint8]:
    """Images (n, height, width, 3) with the spectrum of photos, and as many with edges, textures and plain colour.

    They are seeded, and so the same everywhere.
    """
    return np.concatenate([synthetic_images(height, width), _shapes(height, width)])


def _shapes(height: int, width: int) -> NDArray[np.uint8]:
    """Discs, bars and chequers of random colours over a ramp between two others."""
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
    return images


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
        yield from map(verify_model, versions)
    yield from _verify_aliases(contents)


def verify_model(stored: StoredModel) -> Verdict:
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


def _verify_aliases(contents: Contents) -> Iterator[Verdict]:
    if contents.aliases_failure:
        yield Verdict("aliases", str(contents.aliases_failure))
    for alias, target in contents.aliases.items():
        id_, version = alias_target(target)
        if not any(version in {None, stored.version} for stored in contents.versions.get(id_, ())):
            yield Verdict(alias, f"the alias stands for {target!r}, which is not in the store")
