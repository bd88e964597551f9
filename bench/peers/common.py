"""What every peer has in common: the model, how a image is prepared for it, and the form of the answer.

The model is transformers' PVT-v2 with seeded weights, eager, float32. Preparing is that of the published checkpoints:
shorter side to 248, bicubic, centre crop 224, ImageNet's mean and standard deviation, written with Pillow and numpy.
"""

import argparse
import sys
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

if "torchvision" not in sys.modules and not hasattr(torch.ops.torchvision, "nms"):
    # transformers imports torchvision where it finds it, which fails beside a torch that it was not built for.
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # "not there", to the import system
from transformers import PvtV2Config, PvtV2ForImageClassification

# transformers' configuration of each variant; its defaults are b0's.
_WIDE: dict[str, Any] = {"hidden_sizes": [64, 128, 320, 512]}
CONFIGS: dict[str, dict[str, Any]] = {
    "pvt_v2_b0": {},
    "pvt_v2_b1": _WIDE,
    "pvt_v2_b2": {**_WIDE, "depths": [3, 4, 6, 3]},
    "pvt_v2_b2_li": {**_WIDE, "depths": [3, 4, 6, 3], "linear_attention": True},
    "pvt_v2_b3": {**_WIDE, "depths": [3, 4, 18, 3]},
    "pvt_v2_b4": {**_WIDE, "depths": [3, 8, 27, 3]},
    "pvt_v2_b5": {**_WIDE, "depths": [3, 6, 40, 3], "mlp_ratios": [4, 4, 4, 4]},
}
CLASSES = 1000
BATCH = 8
BATCH_WAIT_SECONDS = 0.01
_SIDE, _CROP = 248, 224
_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def make_model(variant: str = "pvt_v2_b0") -> torch.nn.Module:
    """The eager model, with weights from seed 0."""
    torch.manual_seed(0)
    model: Any = PvtV2ForImageClassification(PvtV2Config(**CONFIGS[variant], num_labels=CLASSES))
    module: torch.nn.Module = model.eval()
    return module


def crop(jpeg: bytes) -> NDArray[np.uint8]:
    """Decode, resize and centre-crop: (224, 224, 3)."""
    image = Image.open(BytesIO(jpeg)).convert("RGB")
    shorter = min(image.size)
    size = _SIDE * image.width // shorter, _SIDE * image.height // shorter
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - _CROP) // 2, (image.height - _CROP) // 2
    return np.asarray(image.crop((left, top, left + _CROP, top + _CROP)))


def prepare(jpeg: bytes) -> torch.Tensor:
    """The model's input of one image: (3, 224, 224)."""
    pixels = (crop(jpeg).astype(np.float32) / 255 - _MEAN) / _STD
    return torch.from_numpy(pixels).permute(2, 0, 1)


def classify(model: torch.nn.Module, batch: torch.Tensor) -> list[dict[str, Any]]:
    """The answers to a batch (n, 3, 224, 224)."""
    with torch.inference_mode():
        return answers(model(batch).logits)


def answers(logits: torch.Tensor) -> list[dict[str, Any]]:
    """The five best classes of each row."""
    top = logits.softmax(-1).topk(5)
    return [
        {"predictions": [{"class_id": i, "score": p} for i, p in zip(ids, scores, strict=True)]}
        for ids, scores in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def port() -> int:
    """The command line's `--port`, where a peer listens on the loopback interface."""
    return int(_arguments().port)


def store() -> str:
    """The command line's `--store`: the model store that our own graph comes from."""
    return str(_arguments().store)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--store", default="")
    return parser.parse_known_args()[0]
