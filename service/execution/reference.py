"""Reference images, the logits that plain float32 computes for them, and the check that a graph reproduces these.

Of a model without a head it is the embeddings in place of logits: there the classes below are channels, and no top
class is looked at.

Stored correct outputs are called "golden", hence `GoldenMismatch`. For a card that names none, they are computed from
synthetic images when the model is first loaded, and kept with its batch plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import ceil
from pathlib import Path
from stat import S_ISREG
from time import perf_counter

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from service.architecture.variants import VARIANTS
from service.backends.base import Graph, Precision, Served, plain_logits
from service.errors import GoldenMismatch, ModelLoadFailed, ReferenceInvalid, ServiceError
from service.results import Floats
from service.store.cards import ModelCard, ReferenceFile

MAX_RELATIVE = 2e-4  # allowed to float32: 200 times what rounding gives, a tenth of what bfloat16 does
# A precision below float32, which computes logits l, is good enough for reference logits r where
#
#     |l - r| <= TOLERANCE * spread         for every logit of every image,
#     r[a] - r[b] <= TOLERANCE * spread     for every image whose top class a becomes another one, b, and
#     cosine(l, r) >= MIN_COSINE            for the logits of all images as one vector;
#
# `spread` is the mean over the reference images of the greatest logit less the least (`Reference.spread`), so that an
# image whose logits are all near zero is not measured by its own noise. Two classes that float32 itself tells apart by
# less than the precision may move one logit change places by chance. docs/decisions/backends-and-precision.md, decision
# 36, has the figures behind both bounds.
TOLERANCE = 0.03
MIN_COSINE = 0.999
REFERENCE_FILE = "reference.safetensors"
SYNTHETIC = 4  # images; the plain module takes 0.3 s for each with the largest variant
# What checking all images may add to a load from the plan cache; if it would take longer, fewer are checked.
RESTORED_SECONDS = 0.05
NOT_FINITE = "it gives NaN or infinity; check its weights and the card's mean and std"


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far logits are from the reference.

    `largest` is the greatest difference of one logit, in image number `image` (from 0), `relative` its share of the
    greatest reference logit, `share` its share of the reference's spread. `cosine` is the cosine similarity of all
    logits as one vector. `changed` of the `images` have another top class; `swap` is the greatest distance between old
    and new top class in the reference logits, as a share of the spread. `outputs` is what the logits are: logits or, of
    a model without a head, embeddings.
    """

    largest: float
    relative: float
    share: float
    image: int
    cosine: float
    changed: int
    swap: float
    images: int
    outputs: str = "logits"

    def __str__(self) -> str:
        swap = f", {self.swap:.2g} of the spread apart" if self.changed else ""
        top = f", another top class in {self.changed} of {self.images}{swap}" if self.outputs == "logits" else ""
        return (
            f"largest difference {self.largest:.3g} in image {self.image}, {self.share:.2g} of the {self.outputs}' "
            f"spread, cosine {self.cosine:.6f}{top}"
        )

    def objection(self, precision: Precision) -> str | None:
        """Why it is too far for logits computed in `precision`; None if it is not."""
        # Comparisons are false for NaN too.
        if precision == "float32":
            if self.relative <= MAX_RELATIVE:
                return None
            return f"{self.outputs} are off by {self.relative:.2g} of the greatest, {MAX_RELATIVE:g} is allowed"
        if not self.share <= TOLERANCE:
            return f"{self.outputs} are off by {self.share:.2g} of their spread, {TOLERANCE:g} is allowed"
        if not self.swap <= TOLERANCE:
            return (
                f"the top class of {self.changed} of {self.images} reference images changes, between classes that are "
                f"{self.swap:.2g} of the spread apart, {TOLERANCE:g} is allowed"
            )
        if not self.cosine >= MIN_COSINE:
            return f"the cosine similarity of {self.outputs} falls to {self.cosine:.6f}, {MIN_COSINE} is required"
        return None


def worst(deviations: Sequence[Deviation]) -> Deviation:
    """The one that is furthest off, with the worst value of all for everything else."""
    furthest = max(deviations, key=lambda each: each.relative)
    tied = max(deviations, key=lambda each: each.swap)
    return replace(
        furthest, cosine=min(each.cosine for each in deviations), changed=tied.changed, swap=tied.swap,
        images=max(each.images for each in deviations),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reference:
    """`images` uint8 (n, height, width, 3), and for each its `logits` float32 (n, classes).

    `embeddings` says that the logits are embeddings (n, channels), of a model without a head.
    """

    images: NDArray[np.uint8]
    logits: Floats
    embeddings: bool = False

    @property
    def ranges(self) -> Floats:
        """(n,) the greatest logit of each image less its least; with a single class, of all images together."""
        axis = 1 if self.logits.shape[1] > 1 else None
        ranges = self.logits.max(axis=axis) - self.logits.min(axis=axis)
        return np.broadcast_to(ranges, len(self.logits))

    @property
    def outputs(self) -> str:
        """What `logits` are, in messages and in a file."""
        return "embeddings" if self.embeddings else "logits"

    @property
    def spread(self) -> float:
        """How much logits differ from one another: the mean of `ranges`."""
        return float(self.ranges.mean())

    def deviation(self, logits: Floats, which: Sequence[int] | None = None) -> Deviation:
        """How far `logits` are off, which a backend computed for the images numbered `which`, by default for all."""
        numbers = np.arange(len(self.images)) if which is None else np.asarray(which)
        expected = self.logits[numbers]
        with np.errstate(all="ignore"):  # logits may be anything
            off = np.abs(expected - logits).max(axis=1)
            cosine = _cosine(expected, logits)
        image = int(np.argmax(off))  # the first NaN, if there is one
        largest = float(off[image])
        rows, old, new = np.arange(len(numbers)), expected.argmax(axis=1), logits.argmax(axis=1)
        changed = numbers[(old != new) & (not self.embeddings)]
        gap = 0.0 if self.embeddings else float((expected[rows, old] - expected[rows, new]).max())
        greatest = max(float(np.abs(self.logits).max()), float(np.finfo(np.float32).tiny))
        spread = self.spread or greatest
        return Deviation(
            largest=largest,
            relative=largest / greatest,
            share=largest / spread,
            image=int(numbers[image]),
            cosine=cosine,
            changed=len(set(changed.tolist())),
            swap=gap / spread,
            images=len(set(numbers.tolist())),
            outputs=self.outputs,
        )


def _cosine(a: Floats, b: Floats) -> float:
    """The cosine similarity of `a` and `b` as vectors; 1 if both are zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.vdot(a, b) / norms) if norms else float(not a.any() and not b.any())


def reference_of(card: ModelCard, folder: Path, file: ReferenceFile | None = None) -> Reference | None:
    """The reference for the model of `card` in `file`, by default in the one that the card names; None without either.

    Raises ReferenceInvalid if the file is missing in `folder`, has another digest, or does not fit the model.
    """
    file = file or card.reference
    if file is None:
        return None
    path, outputs = folder / file.file, "logits" if card.labels else "embeddings"
    try:
        if not S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise ReferenceInvalid(f"{path}: no regular file; put the file that the card names there")
        data = path.read_bytes()
        if (actual := sha256(data).hexdigest()) != file.sha256:
            raise ReferenceInvalid(f"{path}: SHA-256 is {actual}, expected {file.sha256}; copy the file again")
        tensors = safetensors.numpy.load(data)
        images, logits = tensors["images"], tensors[outputs]
    except OSError as error:
        raise ReferenceInvalid(f"{path}: {error.strerror or error}; put the file that the card names there") from error
    except (SafetensorError, KeyError) as error:
        raise ReferenceInvalid(f"{path}: no safetensors file with 'images' and {outputs!r} ({error})") from error
    pixels, n = card.preprocessing, images.shape[0] if images.ndim else 0
    columns = len(card.labels) or VARIANTS[card.variant].embed_dims[-1]
    shapes = ((n, pixels.height, pixels.width, 3), (n, columns))
    types = (images.dtype.name, logits.dtype.name)
    if not n or (images.shape, logits.shape) != shapes or types != ("uint8", "float32"):
        raise ReferenceInvalid(
            f"{path}: images {images.dtype} {images.shape} and {outputs} {logits.dtype} {logits.shape} must be uint8 "
            f"(n, {pixels.height}, {pixels.width}, 3) and float32 (n, {columns})"
        )
    if not np.isfinite(logits).all():
        raise ReferenceInvalid(f"{path}: the {outputs} hold NaN or infinity; make the reference anew")
    return Reference(images, logits, not card.labels)


def packed(reference: Reference) -> tuple[bytes, ReferenceFile]:
    """The file for `reference`, and its entry in a card."""
    data = safetensors.numpy.save({"images": reference.images, reference.outputs: reference.logits})
    return data, ReferenceFile(file=REFERENCE_FILE, sha256=sha256(data).hexdigest())


def synthetic_images(height: int, width: int, count: int = SYNTHETIC) -> NDArray[np.uint8]:
    """Seeded images (count, height, width, 3) whose spectrum falls with frequency, as that of photos does."""
    random = np.random.default_rng(0)
    images = np.zeros((count, height, width, 3))
    cell = 1
    while cell <= max(height, width):  # octaves of noise, each twice as coarse and twice as strong
        noise = random.standard_normal((count, -(-height // cell), -(-width // cell), 3))
        images += cell * noise.repeat(cell, axis=1).repeat(cell, axis=2)[:, :height, :width]
        cell *= 2
    low, high = images.min(axis=(1, 2, 3), keepdims=True), images.max(axis=(1, 2, 3), keepdims=True)
    return np.asarray((images - low) / (high - low) * 255, dtype=np.uint8)


def computed_reference(module: Served, height: int, width: int, count: int = SYNTHETIC) -> Reference:
    """Synthetic images and the logits of `module` for each; raises ModelLoadFailed if these are not finite."""
    images = synthetic_images(height, width, count)
    logits = np.concatenate([plain_logits(module, images[i : i + 1]) for i in range(count)])
    if not np.isfinite(logits).all():
        raise ModelLoadFailed(NOT_FINITE)
    return Reference(images, logits, module.head() is None)


@dataclass(slots=True)
class ReferenceCheck:
    """Checks that graphs reproduce `reference`.

    For a reference that came with the model, `source` is its file, and `plain` computes the plain float32 logits of the
    model for its images: if even those are off, the reference is wrong, not the graph.
    """

    reference: Reference
    source: str = ""
    plain: Callable[[], Floats] | None = None
    # Mutable state: what all checks took.
    seconds: float = field(init=False, default=0.0)

    def check(self, graph: Graph, size: int, count: int | None = None) -> Deviation:
        """Run `graph`, made for batches of `size`, on all images, or on `count` and as many as fill its batches.

        Raises GoldenMismatch with the figures if its logits are too far off for the precision it computes in, or
        ReferenceInvalid if those of the plain module are too, so that the reference is not this model's.
        """
        deviation = self.measure(graph, size, count)
        if objection := deviation.objection(graph.precision):
            self.require_own_reference()
            raise GoldenMismatch(f"{objection} ({graph.precision}, batches of {size}: {deviation})")
        return deviation

    def measure(self, graph: Graph, size: int, count: int | None = None, instance: int = 0) -> Deviation:
        """How far `graph` is off on those images, run on `instance`."""
        images = self.reference.images
        # Images whose logits differ most come first: even a few of them measure the precision, and not its noise.
        order = np.argsort(-self.reference.ranges, kind="stable").tolist()
        numbers = [order[i % len(order)] for i in range(ceil((count or len(order)) / size) * size)]
        batches = [images[numbers[i : i + size]] for i in range(0, len(numbers), size)]
        start = perf_counter()
        logits = np.concatenate([graph.run(instance, batch)[0] for batch in batches])
        self.seconds += perf_counter() - start
        return self.reference.deviation(logits, numbers)

    def check_all(self, graphs: Mapping[int, Graph], latency: Graph | None = None) -> Deviation:
        """Check `graphs`, which are by batch size, and the latency graph, on all images; return the worst deviation."""
        checked = [self.check(graph, size) for size, graph in graphs.items()]
        return worst([*checked, self.check(latency, 1)] if latency else checked)

    def check_restored(self, graphs: Mapping[int, Graph], image_seconds: float) -> Deviation:
        """As `check_all`, for graphs whose bytes were checked before, on what images `RESTORED_SECONDS` allow."""
        few = max(1, min(len(self.reference.images), int(RESTORED_SECONDS / image_seconds)))
        return worst([self.check(graph, size, few if size == 1 else 1) for size, graph in graphs.items()])

    def require_own_reference(self) -> None:
        """Raise ReferenceInvalid if the plain module does not reproduce the reference either."""
        if self.plain is None:
            return
        deviation = self.reference.deviation(self.plain())
        if objection := deviation.objection("float32"):
            raise ReferenceInvalid(
                f"{self.source}: the model itself, in plain float32, does not give the {self.reference.outputs} of "
                f"its reference images: {objection} ({deviation}); the file and the model's weights, labels or "
                "preprocessing do not belong together: make the file anew, or fetch or import the model again"
            )


def concerns_precision(error: Exception) -> bool:
    """Whether another precision may do better: the fault is not that of the model's files, of memory or of a GPU."""
    return isinstance(error, GoldenMismatch) or not isinstance(error, ServiceError)


def reason(error: Exception) -> str:
    """Why a precision is given up."""
    return str(error) if isinstance(error, GoldenMismatch) else f"it failed with {one_line(error)}"


def one_line(error: Exception) -> str:
    """The class and message of `error`; OpenVINO's messages have many lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
