"""Different real pictures to measure with: scikit-learn's two sample photos, 640x427, shifted and compressed anew."""

from io import BytesIO

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

QUALITY = 90


def jpegs(count: int) -> list[bytes]:
    """`count` JPEGs, no two alike, so that no cache on the way can help."""
    photos = load_sample_images().images
    return [_jpeg(np.roll(photos[i % len(photos)], 16 * (i // len(photos)), axis=1)) for i in range(count)]


def _jpeg(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()
