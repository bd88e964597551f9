"""libvips, ImageMagick and cjpeg, as second decoders and as writers of files: commands, which the tests call."""

import io
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


def run(*command: str, stdin: bytes = b"") -> bytes:
    """What it writes to its standard output. Where the command is not installed, the test fails in CI, else skips."""
    if not shutil.which(command[0]):
        missing = f"{command[0]} is not installed: apt-get install imagemagick libvips-tools libjpeg-turbo-progs"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with tempfile.TemporaryDirectory() as folder:  # where ImageMagick leaves files of kinds that it takes for names
        done = subprocess.run(command, input=stdin, capture_output=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def vips(data: bytes) -> NDArray[np.float64]:
    """The file's own numbers, (height, width, bands), of its first frame."""
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder) / "source").write_bytes(data)
        run("vips", "cast", str(source), str(target := Path(folder) / "numbers.v"), "double")
        raw = target.read_bytes()
    width, height, bands = struct.unpack_from("=3i", raw, 4)
    return np.frombuffer(raw, np.float64, width * height * bands, 64).reshape(height, width, bands)


def magick(data: bytes, kind: str, *options: str) -> NDArray[np.uint8]:
    """The first frame in RGB, on white where it is transparent."""
    first = run(
        "convert", f"{kind}:-[0]", "-background", "white", *(options or ("-alpha", "remove")), *_PPM, stdin=data
    )
    with Image.open(io.BytesIO(first)) as image:
        return np.asarray(image.convert("RGB"))


_PPM = ("-colorspace", "sRGB", "-depth", "8", "PPM:-")


def written(image: Image.Image, kind: str, *options: str) -> bytes:
    """`image` as ImageMagick writes it."""
    image.save(buffer := io.BytesIO(), "PNG")
    return run("convert", "png:-", *options, f"{kind}:-", stdin=buffer.getvalue())


def by_vips(image: Image.Image, target: str) -> bytes:
    """`image` as libvips writes it; `target` is a suffix with options, such as `.png[interlace]`."""
    with tempfile.TemporaryDirectory() as folder:
        image.save(source := Path(folder) / "source.png")
        run("vips", "copy", str(source), f"{folder}/target{target}")
        return (Path(folder) / f"target{target.partition('[')[0]}").read_bytes()


def by_cjpeg(image: Image.Image, *options: str, scans: str = "") -> bytes:
    """`image` as libjpeg's own program writes it; `scans` is a script of its option of that name."""
    with tempfile.TemporaryDirectory() as folder:
        (script := Path(folder) / "scans").write_text(scans)
        return run("cjpeg", *options, *(["-scans", str(script)] if scans else []), stdin=saved(image, "PPM"))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """`image` as Pillow writes it."""
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()
