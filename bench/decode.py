"""Milliseconds of one core to decode a JPEG into the model's input: `python -m bench.decode [--rounds 15]`.

A 640x427 photo, and one of 4000x3000 enlarged with grain, scaled and in full, with torch's resampling and Pillow's.
"""

import argparse
from io import BytesIO
from statistics import median
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from service.images import resampling
from service.images.decoding import Geometry, decode

GEOMETRY = Geometry(224, 224, 0.9, "bicubic")
QUALITY = 90
GRAIN = 6  # levels


def main() -> None:
    """Measure all in turn, round by round, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    vectorised = resampling.VECTORISED
    cases = [
        (name, data, scaled, kernel)
        for name, data in (("640x427", photo(640, 427, 0)), ("4000x3000", photo(4000, 3000, GRAIN)))
        for scaled in (True, False)
        for kernel in dict.fromkeys((vectorised, False))
    ]
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds + 1):
        for i, (_, data, scaled, kernel) in enumerate(cases):
            resampling.VECTORISED = kernel
            decode(data, GEOMETRY, max_pixels=50_000_000, scaled_jpeg=scaled)  # the case before left cold caches
            start = perf_counter()
            decode(data, GEOMETRY, max_pixels=50_000_000, scaled_jpeg=scaled)
            times[i].append((perf_counter() - start) * 1000)
    for (name, _, scaled, kernel), ms in zip(cases, times, strict=True):
        how = f"{'scaled' if scaled else 'in full'}, {'torch' if kernel else 'Pillow'}"
        print(f"{name:>9} {how:<16} {median(ms[1:]):7.2f} ms ({min(ms[1:]):.2f} to {max(ms[1:]):.2f})")


def photo(width: int, height: int, grain: float) -> bytes:
    """A sample photo of that size as a JPEG; `grain` is the standard deviation of its noise, in levels."""
    image = Image.fromarray(load_sample_images().images[0]).resize((width, height), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).normal(0, grain, (height, width, 1))
    pixels = np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer := BytesIO(), "JPEG", quality=QUALITY)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
