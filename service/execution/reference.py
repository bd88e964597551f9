"""Reference images and the logits that plain float32 gives for them: what every backend is held against."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from service.arrays import Floats
from service.backends.base import Precision
from service.errors import ReferenceInvalid
from service.store.cards import ModelCard, ReferenceFile

MIN_COSINE = 0.999  # demanded of a reduced precision
MAX_RELATIVE = 2e-4  # allowed to float32: 200 times what rounding gives, a tenth of what bfloat16 does
REFERENCE_FILE = "reference.safetensors"
_SYNTHETIC = 4  # pictures; the plain module answers them at 0.3 s each for the largest variant


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far logits are from the reference.

    `largest` is the greatest difference of one logit, in the logits of image number `image` (from 0), `relative` its
    share of the greatest reference logit. `cosine` is the least of the images, `changed` says how many of the `images`
    have another top class.
    """

    largest: float
    relative: float
    image: int
    cosine: float
    changed: int
    images: int

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.3g} in image {self.image}, least cosine {self.cosine:.6f}, another top "
            f"class in {self.changed} of {self.images}"
        )

    def objection(self, precision: Precision) -> str | None:
        """Why it is too far for logits computed in `precision`; None when it is not."""
        if precision == "float32":
            if self.relative <= MAX_RELATIVE:  # not a number is no agreement either
                return None
            return f"logits are off by {self.relative:.2g} of the greatest, {MAX_RELATIVE:g} is allowed"
        if not self.cosine >= MIN_COSINE:
            return f"the cosine similarity of logits falls to {self.cosine:.6f}, {MIN_COSINE} is demanded"
        return f"the top class of {self.changed} of {self.images} reference images changes" if self.changed else None


@dataclass(frozen=True, slots=True)
class Reference:
    """`images` uint8 (n, height, width, 3), and for each its `logits` float32 (n, classes)."""

    images: NDArray[np.uint8]
    logits: Floats

    def deviation(self, logits: Floats, which: Sequence[int] | None = None) -> Deviation:
        """How far `logits` are off, a backend's for the images numbered `which`, or for all of them in order."""
        numbers = np.arange(len(self.images)) if which is None else np.asarray(which)
        wanted = self.logits[numbers]
        scale = float(np.abs(self.logits).max())
        with np.errstate(all="ignore"):  # logits may be anything
            off = np.abs(wanted - logits).max(axis=1)
            norms = np.linalg.norm(wanted, axis=1) * np.linalg.norm(logits, axis=1)
            cosines = np.sum(wanted * logits, axis=1) / norms
        image = int(np.argmax(off))  # the first that is not a number, if there is one
        return Deviation(
            largest=float(off[image]),
            relative=float(off[image]) / max(scale, float(np.finfo(np.float32).tiny)),
            image=int(numbers[image]),
            cosine=float(cosines.min()),
            changed=int(np.sum(wanted.argmax(axis=1) != logits.argmax(axis=1))),
            images=len(numbers),
        )


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
        data = path.read_bytes()
        if (actual := sha256(data).hexdigest()) != file.sha256:
            raise ReferenceInvalid(f"{path}: SHA-256 is {actual}, expected {file.sha256}; copy the file again")
        tensors = safetensors.numpy.load(data)
        images, logits = tensors["images"], tensors["logits"]
    except OSError as error:
        raise ReferenceInvalid(f"{path}: {error.strerror or error}; put the file that the card names there") from error
    except (SafetensorError, KeyError) as error:
        raise ReferenceInvalid(f"{path}: no safetensors file with 'images' and 'logits' ({error})") from error
    pixels, n = card.preprocessing, len(images)
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


def synthetic_images(height: int, width: int, count: int = _SYNTHETIC) -> NDArray[np.uint8]:
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
