"""Weights and what is known of them -> a model in the store, checked, with its card and golden outputs."""

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

from service.acquisition.pictures import reference_images
from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.variants import VARIANTS
from service.architecture.weights import State, digest, load_into
from service.arrays import Floats
from service.backends.served import Served, plain_logits
from service.errors import WeightsMismatch, WeightsNotFinite
from service.execution.reference import Reference, packed
from service.store.cards import Accuracy, ModelCard, Origin, Preprocessing, WeightsFile
from service.store.store import WEIGHTS_FILE, write_model
from service.store.stored import StoredModel
from service.store.writes import check_room, staging, writing

_PIXELS = 4 * 224 * 224  # of a batch
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
PULL_FOLDER = ".pull"  # in the store: what is on its way there


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a card says of a model that is not in its weights. `labels` None names each class after its number."""

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
        WeightsNotFinite: they hold NaN or infinity, or give such an answer.
        StoreNotWritable: the store can't be written; it is as it was.
    """
    labels = _labels(state, about)
    with torch.device("meta"):
        model = create(about.variant, num_classes=len(labels))
    _load(model, state, about)
    reference, reference_file = packed(_golden(model, about.preprocessing, about.source))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    with writing(root), _no_empty_folder(root / about.id):
        (root / PULL_FOLDER).mkdir(parents=True, exist_ok=True)
        check_room(root, size + len(reference))
        with staging(root / PULL_FOLDER, "new-") as folder:
            weights = folder / WEIGHTS_FILE
            _save(state, weights)
            card = ModelCard(
                id=about.id,
                variant=about.variant,
                labels=labels,
                preprocessing=about.preprocessing,
                weights=WeightsFile(file=WEIGHTS_FILE, sha256=digest(weights), bytes=weights.stat().st_size),
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
    """A model's folder without a version, which what failed may have left, would count as a broken model."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            model.rmdir()
        raise


def _save(state: State, path: Path) -> None:
    """Raises an OSError where safetensors tells of one in its own words: it writes without a copy in memory.

    It also makes a file that only its owner may read, in place of any other; this one gets the mode of its neighbours.
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
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
    """`load_into`, and which variant it is where it is another."""
    try:
        load_into(model, state, source=about.source)
    except WeightsMismatch as error:
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for other in VARIANTS:
            with torch.device("meta"):
                wanted = create(other, num_classes=classes(state)).state_dict()
            if found == {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
                raise WeightsMismatch(f"{about.source} holds {other}, not {about.variant}") from error
        raise


def plain_outputs(module: Served, images: NDArray[np.uint8]) -> Floats:
    """Logits (n, classes) of `images` by the plain module, a few at a time."""
    step = max(1, _PIXELS // (images.shape[1] * images.shape[2]))
    return np.concatenate([plain_logits(module, images[i : i + step]) for i in range(0, len(images), step)])


def _golden(model: PVT_V2, pixels: Preprocessing, source: str) -> Reference:
    images = reference_images(pixels.height, pixels.width)
    logits = plain_outputs(Served(model, pixels.mean, pixels.std).eval(), images)
    if not np.isfinite(logits).all():
        raise WeightsNotFinite(f"{source}: the model answers NaN or infinity to ordinary pictures")
    return Reference(images, logits)
