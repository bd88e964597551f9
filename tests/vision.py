"""torchvision beside a CPU build of torch, whose operators it then lacks: timm and transformers import it."""

from importlib.util import find_spec
from pathlib import Path

import torch

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as what is defined in it


def define_operators() -> None:
    """Make `import torchvision` succeed where its own library, built for another torch, can't be loaded.

    It registers shapes for two operators when it is imported, so they must have a schema. Nothing runs them.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            return
    except OSError:
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
