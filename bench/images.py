"""Different real images to measure with: crops of scikit-learn's two sample photos, each compressed anew."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

QUALITY = 90
USUAL = (640, 427)
LARGE = (4000, 3000)  # 12 megapixels
NOISE = 4.0  # of 255, standard deviation: what enlarging takes away of a camera's image, its noise, and so its bytes


def jpegs(count: int, size: tuple[int, int] = USUAL, *, seed: int = 0) -> list[bytes]:
    """`count` JPEGs of `size` (width, height), no two alike, so that no cache on the way can help."""
    return [_jpeg(np.asarray(image)) for image in _crops(count, size, seed)]


def large_jpegs(count: int, *, seed: int = 1) -> list[bytes]:
    """`count` different JPEGs of 12 megapixels, enlarged, with noise as a camera has it."""
    noise = np.random.default_rng(seed)
    return [_jpeg(_noisy(image, noise)) for image in _crops(count, LARGE, seed)]


def _crops(count: int, size: tuple[int, int], seed: int) -> list[Image.Image]:
    """Crops of 80 to 100 % of the photos in turn, at random places, every other one mirrored, scaled to `size`."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    random = np.random.default_rng(seed)
    crops = []
    for i in range(count):
        photo = photos[i % len(photos)]
        height = float(random.uniform(0.8, 1.0)) * min(photo.height, photo.width * size[1] / size[0])
        width = height * size[0] / size[1]
        left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
        crop = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        crops.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i // len(photos) % 2 else crop)
    return crops


def _noisy(image: Image.Image, random: np.random.Generator) -> NDArray[np.uint8]:
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + random.standard_normal((*pixels.shape[:2], 1), dtype=np.float32) * NOISE
    return pixels.clip(0, 255).astype(np.uint8)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()
