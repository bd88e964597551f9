"""A folder of images and a model of the store as backbone -> a version of a new model, with a head of its own.

Beside a version lie the embeddings of its images, their classes and the SHA-256 of their files, never the images: with
these, `--add` fits the next version to earlier images and new ones.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from service.acquisition.publishing import Description, publish
from service.architecture.weights import read_checkpoint
from service.engine import Engine
from service.errors import InvalidRequest, ServiceError
from service.files import file_sha256
from service.labelled.fitting import Fitted, fit_head, require_fitting
from service.labelled.folder import LabelledFolder, Skipped, shown
from service.labelled.running import infer_many, read_image
from service.results import Floats
from service.store.cards import Accuracy
from service.store.store import MODEL_ID, StoredModel

EMBEDDINGS_FILE = "embeddings.safetensors"
_DIGEST = 32  # bytes
_File = tuple[str, Path]  # class and path
Step = Callable[[str, int], None]
"""Reports progress: what is done, and how many steps that takes in all, before the first; then 0 for each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """`model` is the backbone; with `add` the fitted model itself, or its backbone if `tag` is given."""

    model: str
    tag: str | None = None
    add: bool = False
    seed: int = 0
    balanced: bool = False


@dataclass(frozen=True, slots=True)
class FitResult:
    """What became of a fit: the new version, how many images each class has in it, and what was left out.

    `known` images were in the version before, with the same class; `moved` ones with another, which the new one
    replaced.
    """

    stored: StoredModel
    fitted: Fitted
    counts: Mapping[str, int]
    skipped: Sequence[Skipped]
    known: int
    moved: int


@dataclass(frozen=True, slots=True, eq=False)
class _Images:
    """Embeddings (n, channels), the class numbers and the SHA-256 of n images; `labels` are names of the classes."""

    labels: Sequence[str]
    embeddings: Floats
    classes: NDArray[np.int64]
    digests: Sequence[str]

    @classmethod
    def joined(
        cls, earlier: "_Images | None", files: Mapping[str, _File], embedded: Mapping[str, Floats | ServiceError]
    ) -> "_Images":
        """The `earlier` ones, whose classes keep their order, and those `embedded`, of which `files` has the class.

        A class of which no image is left is left out.
        """
        old = dict(zip(earlier.digests, earlier.embeddings, strict=True)) if earlier else {}
        new = {digest: each for digest, each in embedded.items() if not isinstance(each, ServiceError)}
        names = [earlier.labels[i] for i in earlier.classes] if earlier else []
        before = dict(zip(old, names, strict=True))
        classes = [files[digest][0] if digest in files else before[digest] for digest in (*old, *new)]
        order = [*(earlier.labels if earlier else ()), *sorted({*classes} - {*(earlier.labels if earlier else ())})]
        labels = [label for label in order if label in {*classes}]
        numbers = {label: i for i, label in enumerate(labels)}
        rows = [*old.values(), *new.values()]
        embeddings = np.stack(rows) if rows else np.empty((0, 0), np.float32)
        return cls(labels, embeddings, np.array([numbers[each] for each in classes], np.int64), [*old, *new])

    def packed(self) -> bytes:
        """All but the labels, which are on the card, as a safetensors file."""
        digests = np.frombuffer(bytes.fromhex("".join(self.digests)), np.uint8).reshape(-1, _DIGEST)
        arrays: dict[str, NDArray[Any]] = {
            "embeddings": self.embeddings,
            "classes": self.classes,
            "digests": digests,
        }
        return safetensors.numpy.save(arrays)

    @classmethod
    def unpacked(cls, content: bytes, labels: Sequence[str]) -> "_Images":
        """What `packed` made; raises a SafetensorError, KeyError or ValueError for anything else."""
        arrays = safetensors.numpy.load(content)
        embeddings, classes, digests = (arrays[name] for name in ("embeddings", "classes", "digests"))
        if not len(embeddings) == len(classes) == len(digests) > 0 <= classes.min() <= classes.max() < len(labels):
            raise ValueError("its parts do not fit together, or not the card")
        return cls(labels, embeddings, classes, [bytes(each).hex() for each in digests])


async def fit(engine: Engine, root: Path, folder: LabelledFolder, options: FitOptions, step: Step) -> FitResult:
    """Fit a head to the images of `folder`, and put backbone and head into the store at `root`, which `engine` serves.

    Raises:
        InvalidRequest: `options` go together with no model, or there are fewer than two classes with images.
        ServiceError: what `Engine.infer` raises of models, and `publish` of stores.
    """
    require_fitting()
    stored, id_ = await _backbone(engine, options)
    earlier = _kept(stored) if options.add else None
    skipped = list(folder.skipped)
    files = _distinct_files(folder, skipped, step)
    before = dict(zip(earlier.digests, earlier.classes.tolist(), strict=True)) if earlier else {}
    new = {digest: each for digest, each in files.items() if digest not in before}
    embedded = await _embedded(engine, stored, new, step)
    skipped += [Skipped(shown(new[digest][1]), str(e)) for digest, e in embedded.items() if isinstance(e, ServiceError)]
    images = _Images.joined(earlier, files, embedded)
    fitted = fit_head(
        images.embeddings, images.classes, images.labels, seed=options.seed, balanced=options.balanced,
        step=lambda count: step("head" if count else "", count),
    )  # fmt: skip
    about = _description(stored, id_, images, fitted, folder.root.resolve().name, options)
    written = publish(root, _state(stored, fitted), about, beside={EMBEDDINGS_FILE: images.packed()})
    moved = sum(earlier.labels[before[each]] != files[each][0] for each in before if each in files) if earlier else 0
    counts = {label: int((images.classes == i).sum()) for i, label in enumerate(images.labels)}
    return FitResult(written, fitted, counts, skipped, len(files) - len(new) - moved, moved)


async def _backbone(engine: Engine, options: FitOptions) -> tuple[StoredModel, str]:
    """The version whose backbone is used, and the id of the model to write."""
    name, id_ = options.model, ""
    if options.tag is not None:
        id_ = f"{(await engine.model(name)).stored.variant}.{options.tag}"
        if not MODEL_ID.fullmatch(id_):
            raise InvalidRequest(f"tag {options.tag!r}: it has letters, digits, '-' and '_'")
        name = id_ if options.add else name
    await engine.load(name)
    stored = (await engine.model(name)).stored
    if options.add:
        return stored, stored.id
    if options.tag is None:
        raise InvalidRequest(f"name the new model with --tag, such as --tag birds for {stored.variant}.birds")
    if id_ == stored.id:
        raise InvalidRequest(f"{id_} is the backbone itself; choose another --tag, or add images to it with --add")
    return stored, id_


def _distinct_files(folder: LabelledFolder, skipped: list[Skipped], step: Step) -> dict[str, _File]:
    """Class and path of each image by its SHA-256; one that is in two classes is left out of both."""
    step("reading", sum(map(len, folder.classes.values())))
    found = defaultdict[str, list[_File]](list)
    for label, paths in folder.classes.items():
        for path in paths:
            step("", 0)
            try:
                found[file_sha256(path)].append((label, path))
            except OSError as error:
                skipped.append(Skipped(shown(path), error.strerror or str(error)))
    files: dict[str, _File] = {}
    for digest, ((label, path), *others) in found.items():
        if any(other != label for other, _ in others):
            paths = [path, *(each for _, each in others)]
            skipped += [
                Skipped(shown(each), f"the same image, as another class: {shown(paths[each == paths[0]])}")
                for each in paths
            ]
            continue
        files[digest] = label, path
        skipped += [Skipped(shown(each), f"the same image as {shown(path)}") for _, each in others]
    return files


async def _embedded(
    engine: Engine, stored: StoredModel, files: Mapping[str, _File], step: Step
) -> dict[str, Floats | ServiceError]:
    """The embedding (channels,) of each file by its digest, or why there is none."""
    limit, found = engine.options.max_body_bytes, dict[str, Floats | ServiceError]()
    step(stored.key, len(files))
    running = infer_many(engine, stored.key, files.items(), lambda item: read_image(item[1][1], limit))
    async for (digest, _), result in running:
        step("", 0)
        found[digest] = result if isinstance(result, ServiceError) else result.outputs.embedding
    return found


def _kept(stored: StoredModel) -> _Images:
    """The embeddings beside a fitted version; raises InvalidRequest where there are none."""
    path = stored.folder / EMBEDDINGS_FILE
    try:
        return _Images.unpacked(path.read_bytes(), stored.require_card().labels)
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"no embeddings lie beside {stored.key}, so 'pvt-serve fit' has not made it; leave --add out, and name the "
            "folder of all images and a --tag"
        ) from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InvalidRequest(f"{path}: {error}; leave --add out, and name the folder of all images") from error


def _state(stored: StoredModel, fitted: Fitted) -> dict[str, torch.Tensor]:
    """The backbone's weights, and the head."""
    card = stored.require_card()
    state = read_checkpoint(stored.folder / card.weights.file, sha256=card.weights.sha256)
    backbone = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    weight, bias = map(torch.tensor, fitted.head)
    return backbone | {"head.weight": weight, "head.bias": bias}


def _description(  # noqa: PLR0917  all of it is in the card
    stored: StoredModel, id_: str, images: _Images, fitted: Fitted, name: str, options: FitOptions
) -> Description:
    """The card's fields for images of which the last are from a folder called `name`."""
    card, table = stored.require_card(), fitted.held_out
    accuracy = None
    if table:
        accuracy = Accuracy(dataset=f"{name}, held out", top1=round(table.accuracy, 4), images=table.images)
    return Description(
        id=id_,
        variant=card.variant,
        preprocessing=card.preprocessing,
        licence=card.licence,
        source=card.source if options.add else f"{card.source}; {stored.key} with a head by pvt-serve fit",
        labels=images.labels,
        accuracy=accuracy,
        training=f"Logistic regression (scikit-learn {installed('scikit-learn')}) on the embeddings of "
        f"{len(images.classes)} images of {len(images.labels)} classes"
        f"{f', those of {stored.key} and more' if options.add else ''} from {name}; C {fitted.strength:g} by "
        f"cross-validation, seed {options.seed}{', classes weighted equally' if options.balanced else ''}; temperature "
        f"{fitted.temperature:.4g}, by which the head is divided.",
    )
