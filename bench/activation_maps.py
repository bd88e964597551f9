"""The README's image of class activation maps: `python -m bench.activation_maps`.

Each map is made by `pvt-serve explain`, each caption by `pvt-serve predict`, with the embedded model.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
from matplotlib import pyplot as plt
from PIL import Image

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "docs" / "digits"
OUTPUT = ROOT / "docs" / "assets" / "activation-maps.png"
NAMES = ("two", "four", "five", "seven", "eight")
ALPHA = "0.45"


def main() -> None:
    """Write the image: each digit, below it the map of its best class, and the two best classes."""
    mpl.use("Agg")
    figure, axes = plt.subplots(2, len(NAMES), figsize=(2 * len(NAMES), 4.5), layout="constrained")
    with TemporaryDirectory() as folder:
        for name, (above, below) in zip(NAMES, axes.T, strict=True):
            file, heat = DIGITS / f"{name}.png", Path(folder) / f"{name}.png"
            _pvt_serve("explain", str(file), "--alpha", ALPHA, "-o", str(heat))
            above.imshow(Image.open(file).convert("L"), cmap="gray", interpolation="bicubic")
            below.imshow(Image.open(heat), interpolation="bicubic")
            below.set_xlabel(_caption(file), fontsize=11)
            for axis in (above, below):
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
    figure.savefig(OUTPUT, dpi=110, metadata={"Software": None})


def _caption(file: Path) -> str:
    found = json.loads(_pvt_serve("predict", "--json", "--top-k", "2", str(file)))
    return "\n".join(f"{each['label']}: {each['score']:.1%}" for each in found["predictions"])


def _pvt_serve(*arguments: str) -> str:
    command = [sys.executable, "-m", "cli", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
