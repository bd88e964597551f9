"""`python -m tests.service.images.peaks`: by how many bytes decoding an image raises the peak of a process.

A line with an image's path is answered by a line with the bytes, measured in a fork of this process: each image
meets the same memory, and torch is imported only once.
"""

import os
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from service.images.decoding import FORMATS, Geometry, decode

GEOMETRY = Geometry(224, 224, 0.9, "bicubic")


def peak() -> int:
    """VmHWM and not getrusage's ru_maxrss, which a child starts with at the size of the process that spawned it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def small(kind: str) -> bytes:
    Image.new("RGB", (64, 64)).save(buffer := BytesIO(), kind)
    return buffer.getvalue()


def measure(path: Path, warm: Sequence[bytes]) -> None:
    # A fork counts pages of libraries only once it touches them; without this they would seem to be the image's.
    for image in warm:
        decode(image, GEOMETRY, max_pixels=50_000_000)
    data, before = path.read_bytes(), peak()
    decode(data, GEOMETRY, max_pixels=50_000_000, scaled_jpeg=False)
    print(peak() - before, flush=True)  # noqa: T201  it is what it is for


if __name__ == "__main__":
    images = [small(kind) for kind in FORMATS]
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            status = 1
            try:
                measure(Path(line.rstrip("\n")), images)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            sys.exit("the image was not decoded")
