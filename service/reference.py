"""Reference images and the logits that plain float32 gives for them: what a reduced precision is held against."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from service.cards import ModelCard, ReferenceFile
from service.errors import ReferenceInvalid
from service.outputs import Floats

MIN_COSINE = 0.999
REFERENCE_FILE = "reference.safetensors"
_SYNTHETIC = 4  # pictures; the plain module answers them at 0.3 s each for the largest variant


@dataclass(frozen=True, slots=True)
class Reference:
    """`images` uint8 (n, height, width, 3), and for each its `logits` float32 (n, classes)."""

    images: NDArray[np.uint8]
    logits: Floats

    def objection(self, logits: Floats) -> str | None:
        """Why `logits`, a backend's for the same images, are not good enough; None when they are."""
        norms = np.linalg.norm(self.logits, axis=1) * np.linalg.norm(logits, axis=1)
        cosine = float(np.min(np.sum(self.logits * logits, axis=1) / norms))
        if not cosine >= MIN_COSINE:  # not a number is no agreement either
            return f"the cosine similarity of logits falls to {cosine:.6f}, {MIN_COSINE} is demanded"
        changed = int(np.sum(self.logits.argmax(axis=1) != logits.argmax(axis=1)))
        return f"the top class of {changed} of {len(logits)} reference images changes" if changed else None


def read_reference(card: ModelCard, folder: Path) -> Reference | None:
    """The reference that the card names; None when it names none.

    Raises:
        ReferenceInvalid: the file is missing, is not the one the card speaks of, or does not fit the model.
    """
    if card.reference is None:
        return None
    path = folder / card.reference.file
    try:
        data = path.read_bytes()
        if (actual := sha256(data).hexdigest()) != card.reference.sha256:
            raise ReferenceInvalid(f"{path}: SHA-256 is {actual}, the card says {card.reference.sha256}")
        tensors = safetensors.numpy.load(data)
        images, logits = tensors["images"], tensors["logits"]
    except OSError as error:
        raise ReferenceInvalid(f"{path}: {error.strerror or error}; put the file that the card names there") from error
    except (SafetensorError, KeyError) as error:
        raise ReferenceInvalid(f"{path}: no safetensors file with 'images' and 'logits' ({error})") from error
    pixels, n = card.preprocessing, len(images)
    wanted = ((n, pixels.height, pixels.width, 3), (n, len(card.labels)))
    types = (images.dtype.name, logits.dtype.name)
    if not n or (images.shape, logits.shape) != wanted or types != ("uint8", "float32"):
        raise ReferenceInvalid(
            f"{path}: images {images.dtype} {images.shape} and logits {logits.dtype} {logits.shape} must be uint8 "
            f"(n, {pixels.height}, {pixels.width}, 3) and float32 (n, {len(card.labels)})"
        )
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
