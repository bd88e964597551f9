"""Folders with models, written by the libraries themselves, and what those answer to an image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.models import save_for_hf
from transformers import PvtV2Config, PvtV2ForImageClassification
from transformers.models.pvt.image_processing_pil_pvt import PvtImageProcessorPil

from service.architecture.variants import VARIANTS
from service.backends.base import build, plain_logits
from service.store.store import StoredModel

BIRDS = ("wren", "robin", "kite")
SHARD = "4MB"


def spread_out(model: Any) -> Any:
    """Every tensor random: fresh ones have zeros and ones in places, which would not show where they are swapped."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def in_transformers(
    folder: Path, *, shards: bool = False, processor: Mapping[str, Any] | None = None, **changes: Any
) -> PvtV2ForImageClassification:
    """The model that was saved to `folder`, with its image processor if that is given."""
    fields = {"num_labels": len(BIRDS), "id2label": dict(enumerate(BIRDS)), **changes}
    variant = VARIANTS[fields.pop("variant", "pvt_v2_b0")]
    shape = {
        "depths": variant.depths, "hidden_sizes": variant.embed_dims, "mlp_ratios": variant.mlp_ratios,
        "linear_attention": variant.linear,
    }  # fmt: skip
    model = spread_out(PvtV2ForImageClassification(PvtV2Config.from_dict(shape | fields)))
    model.save_pretrained(folder, max_shard_size=SHARD if shards else "5GB")
    if processor is not None:
        PvtImageProcessorPil(**processor).save_pretrained(folder)
    return model


def in_timm(folder: Path, variant: str = "pvt_v2_b0", *, safe: bool = True, **config: Any) -> Any:
    """The model that was saved to `folder` as for the hub."""
    model = spread_out(timm.create_model(variant, num_classes=len(BIRDS)))
    save_for_hf(model, str(folder), safe_serialization=safe, **config)
    return model


def answers_of(stored: StoredModel, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits (n, classes) of the model in the store."""
    logits: NDArray[np.float32] = plain_logits(build(stored.require_card(), stored.folder), images)
    return logits


def normalised(stored: StoredModel, images: NDArray[np.uint8]) -> torch.Tensor:
    """Images (n, 3, height, width) as the card says that they are normalised."""
    pixels = stored.require_card().preprocessing
    return torch.from_numpy(((images / 255 - pixels.mean) / pixels.std).astype(np.float32)).permute(0, 3, 1, 2)
