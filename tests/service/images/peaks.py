"""`python -m tests.service.images.peaks`: by how many bytes decoding an image raises the peak of a process.

A line of `full` or `scaled` and an image's path is answered by a line with the bytes, measured in a fork of this
process: each image meets the same memory, and torch is imported only once.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from service.images.decoding import FORMATS, Geometry, decode
from tests.conftest import ROOT

GEOMETRY = Geometry(224, 224, 0.9, "bicubic")


@contextmanager
def measuring() -> Iterator[Callable[..., int]]:
    """Gives a function of an image's bytes: by how many decoding it raises the peak of a process; `scaled` or not."""
    command = [sys.executable, "-m", "tests.service.images.peaks"]
    with (
        TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):

        def measure(data: bytes, *, scaled: bool = False) -> int:
            assert process.stdin
            assert process.stdout
            (file := Path(folder) / "image").write_bytes(data)
            print("scaled" if scaled else "full", file, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield measure


def peak() -> int:
    """VmHWM and not getrusage's ru_maxrss, which a child starts with at the size of the process that spawned it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def small(kind: str) -> bytes:
    Image.new("RGB", (64, 64)).save(buffer := BytesIO(), kind)
    return buffer.getvalue()


def measure_one(way: str, path: Path, warm: Sequence[bytes]) -> None:
    # A fork counts pages of libraries only once it touches them; without this they would seem to be the image's.
    for image in warm:
        decode(image, GEOMETRY, max_pixels=50_000_000)
    data, before = path.read_bytes(), peak()
    decode(data, GEOMETRY, max_pixels=50_000_000, scaled_jpeg=way == "scaled")
    print(peak() - before, flush=True)  # noqa: T201  it is what it is for


if __name__ == "__main__":
    images = [small(kind) for kind in FORMATS]
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            status = 1
            try:
                way, path = line.rstrip("\n").split(" ", 1)
                measure_one(way, Path(path), images)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            sys.exit("the image was not decoded")
