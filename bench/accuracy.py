"""How many of the held-out digits `POST /predict` reads right at each input size: `python -m bench.accuracy`.

The embedded model, or that of another store, in a server with the default settings but for `PVT_*` variables. No digit
that is posted had a part in the training: `training.digits.split`.
"""

import argparse
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from bench.bodies import bodies
from bench.peers import OURS
from bench.server import ROOT, serving
from pvt_client import Client, Prediction
from training.digits import SIZES, render, split


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--store", type=Path, default=ROOT / "model_store")
    options = parser.parse_args()
    pixels, labels = split().held_out
    images = [_png(each) for each in pixels]
    with TemporaryDirectory() as folder, serving(OURS, Path(folder), options.store) as server:
        print("| size | right | of | top-1 |\n|---|---|---|---|")
        server.wait(bodies(images[:1], OURS.form)[0])
        with Client(server.url.removesuffix(OURS.path), timeout=600) as client:
            for side in options.sizes:
                found = client.predict(images, top_k=1, size=side, errors="raise")
                best = [each.best.class_id for each in found if isinstance(each, Prediction)]
                right = sum(one == other for one, other in zip(best, labels, strict=True))
                print(f"| {side} | {right} | {len(labels)} | {right / len(labels):.1%} |", flush=True)


def _png(pixels: NDArray[np.float64]) -> bytes:
    buffer = BytesIO()
    render(pixels).save(buffer, "png")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
