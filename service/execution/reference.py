"""Reference images and the logits that plain float32 gives for them: what every backend is held against."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from service.arrays import Floats
from service.backends.base import Precision
from service.errors import ReferenceInvalid
from service.store.cards import ModelCard, ReferenceFile

MAX_RELATIVE = 2e-4  # allowed to float32: 200 times what rounding gives, a tenth of what bfloat16 does
# A precision below float32 is good enough for reference logits r, and logits l that it gives, where
#
#     |l - r| <= TOLERANCE * spread         for every logit of every image,
#     r[a] - r[b] <= TOLERANCE * spread     for every image whose top class a becomes another one, b, and
#     cosine(l, r) >= MIN_COSINE            for the logits of all images as one vector;
#
# `spread` is the mean over the reference images of their greatest logit less their least (`Reference.spread`): an image
# whose logits are all near zero is measured with what the model gives elsewhere, and not with its own noise. What
# decides of two classes that float32 itself tells apart by less than the precision may move one logit is chance, and no
# changed answer. docs/decisions/backends-and-precision.md, decision 36, has the figures behind both bounds.
TOLERANCE = 0.03
MIN_COSINE = 0.999
REFERENCE_FILE = "reference.safetensors"
SYNTHETIC = 4  # images; the plain module answers them at 0.3 s each for the largest variant


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far logits are from the reference.

    `largest` is the greatest difference of one logit, in the logits of image number `image` (from 0), `relative` its
    share of the greatest reference logit, `share` its share of the reference's spread. `cosine` is that of all logits
    as one vector. `changed` says how many of the `images` have another top class, and `swap` is the greatest distance
    between an old and a new one in the reference logits, as a share of the spread; 0 where none has.
    """

    largest: float
    relative: float
    share: float
    image: int
    cosine: float
    changed: int
    swap: float
    images: int

    def __str__(self) -> str:
        swap = f", {self.swap:.2g} of the spread apart" if self.changed else ""
        return (
            f"largest difference {self.largest:.3g} in image {self.image}, {self.share:.2g} of the logits' spread, "
            f"cosine {self.cosine:.6f}, another top class in {self.changed} of {self.images}{swap}"
        )

    def objection(self, precision: Precision) -> str | None:
        """Why it is too far for logits computed in `precision`; None when it is not."""
        if precision == "float32":
            if self.relative <= MAX_RELATIVE:  # not a number is no agreement either
                return None
            return f"logits are off by {self.relative:.2g} of the greatest, {MAX_RELATIVE:g} is allowed"
        if not self.share <= TOLERANCE:
            return f"logits are off by {self.share:.2g} of their spread, {TOLERANCE:g} is allowed"
        if not self.swap <= TOLERANCE:
            return (
                f"the top class of {self.changed} of {self.images} reference images changes, between classes that are "
                f"{self.swap:.2g} of the spread apart, {TOLERANCE:g} is allowed"
            )
        if not self.cosine >= MIN_COSINE:
            return f"the cosine similarity of logits falls to {self.cosine:.6f}, {MIN_COSINE} is demanded"
        return None


def worst(deviations: Sequence[Deviation]) -> Deviation:
    """The furthest off, with the worst of all for what another one is worse in."""
    furthest = max(deviations, key=lambda each: each.relative)
    tied = max(deviations, key=lambda each: each.swap)
    return replace(
        furthest, cosine=min(each.cosine for each in deviations), changed=tied.changed, swap=tied.swap,
        images=max(each.images for each in deviations),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reference:
    """`images` uint8 (n, height, width, 3), and for each its `logits` float32 (n, classes)."""

    images: NDArray[np.uint8]
    logits: Floats

    @property
    def ranges(self) -> Floats:
        """(n,) the greatest logit of each image less its least; of all images together where there is one class."""
        axis = 1 if self.logits.shape[1] > 1 else None
        ranges = self.logits.max(axis=axis) - self.logits.min(axis=axis)
        return np.broadcast_to(ranges, len(self.logits))

    @property
    def spread(self) -> float:
        """By how much logits differ from one another: the mean of `ranges`."""
        return float(self.ranges.mean())

    def deviation(self, logits: Floats, which: Sequence[int] | None = None) -> Deviation:
        """How far `logits` are off, a backend's for the images numbered `which`, or for all of them in order."""
        numbers = np.arange(len(self.images)) if which is None else np.asarray(which)
        wanted = self.logits[numbers]
        with np.errstate(all="ignore"):  # logits may be anything
            off = np.abs(wanted - logits).max(axis=1)
            cosine = _cosine(wanted, logits)
        image = int(np.argmax(off))  # the first that is not a number, if there is one
        rows, old, new = np.arange(len(numbers)), wanted.argmax(axis=1), logits.argmax(axis=1)
        gaps = wanted[rows, old] - wanted[rows, new]
        greatest = float(np.abs(self.logits).max())
        return Deviation(
            largest=float(off[image]),
            relative=_over(float(off[image]), greatest),
            share=_over(float(off[image]), self.spread or greatest),
            image=int(numbers[image]),
            cosine=cosine,
            changed=len(set(numbers[old != new].tolist())),
            swap=_over(float(gaps.max()), self.spread or greatest),
            images=len(set(numbers.tolist())),
        )


def _over(part: float, whole: float) -> float:
    return part / max(whole, float(np.finfo(np.float32).tiny))


def _cosine(a: Floats, b: Floats) -> float:
    """Of all their numbers as one vector each; of two that are zero 1."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not norms:
        return float(not a.any() and not b.any())
    return float(np.sum(a * b)) / norms


def reference_of(card: ModelCard, folder: Path) -> Reference | None:
    """The reference that the card in `folder` names; None when it names none.

    Raises:
        ReferenceInvalid: as `read_reference`.
    """
    return read_reference(card, folder, card.reference) if card.reference else None


def read_reference(card: ModelCard, folder: Path, file: ReferenceFile) -> Reference:
    """The reference in `file`, which lies in `folder`, for the model of `card`.

    Raises:
        ReferenceInvalid: the file is missing, is another than it should be, or does not fit the model.
    """
    path = folder / file.file
    try:
        if not S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise ReferenceInvalid(f"{path}: no regular file; put the file that the card names there")
        data = path.read_bytes()
        if (actual := sha256(data).hexdigest()) != file.sha256:
            raise ReferenceInvalid(f"{path}: SHA-256 is {actual}, expected {file.sha256}; copy the file again")
        tensors = safetensors.numpy.load(data)
        images, logits = tensors["images"], tensors["logits"]
    except OSError as error:
        raise ReferenceInvalid(f"{path}: {error.strerror or error}; put the file that the card names there") from error
    except (SafetensorError, KeyError) as error:
        raise ReferenceInvalid(f"{path}: no safetensors file with 'images' and 'logits' ({error})") from error
    pixels, n = card.preprocessing, images.shape[0] if images.ndim else 0
    wanted = ((n, pixels.height, pixels.width, 3), (n, len(card.labels)))
    types = (images.dtype.name, logits.dtype.name)
    fits = n and (images.shape, logits.shape) == wanted and types == ("uint8", "float32")
    if not fits:
        raise ReferenceInvalid(
            f"{path}: images {images.dtype} {images.shape} and logits {logits.dtype} {logits.shape} must be uint8 "
            f"(n, {pixels.height}, {pixels.width}, 3) and float32 (n, {len(card.labels)})"
        )
    if not np.isfinite(logits).all():
        raise ReferenceInvalid(f"{path}: the logits hold NaN or infinity; make the reference anew")
    return Reference(images, logits)


def packed(reference: Reference) -> tuple[bytes, ReferenceFile]:
    """The file for `reference`, and what a card says of it."""
    data = safetensors.numpy.save({"images": reference.images, "logits": reference.logits})
    return data, ReferenceFile(file=REFERENCE_FILE, sha256=sha256(data).hexdigest())


def synthetic_images(height: int, width: int, count: int = SYNTHETIC) -> NDArray[np.uint8]:
    """Seeded pictures (count, height, width, 3) whose spectrum falls with frequency, as that of photos does."""
    random = np.random.default_rng(0)
    images = np.zeros((count, height, width, 3))
    cell = 1
    while cell <= max(height, width):  # octaves of noise, each twice as coarse and twice as strong
        noise = random.standard_normal((count, -(-height // cell), -(-width // cell), 3))
        images += cell * noise.repeat(cell, axis=1).repeat(cell, axis=2)[:, :height, :width]
        cell *= 2
    low, high = images.min(axis=(1, 2, 3), keepdims=True), images.max(axis=(1, 2, 3), keepdims=True)
    return np.asarray((images - low) / (high - low) * 255, dtype=np.uint8)
