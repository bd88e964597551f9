"""Checkpoints of pvt_v2_b0's true shapes with seeded weights, as bytes, in each public dialect."""

import io
from collections.abc import Mapping
from functools import cache

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PvtV2Config, PvtV2ForImageClassification

from service.acquisition.catalogue import CATALOGUE, SourceName
from service.architecture.pvt_v2 import create
from service.architecture.variants import VARIANTS
from tests.service.architecture.test_weights import in_lucid, in_timm

B0 = CATALOGUE["pvt_v2_b0"]


@cache
def official(classes: int = 1000, variant: str = "pvt_v2_b0") -> Mapping[str, Tensor]:
    torch.manual_seed(7)
    return dict(create(variant, num_classes=classes).state_dict())


def pickled(state: object) -> bytes:
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


def transformers_state(classes: int = 1000) -> dict[str, Tensor]:
    row = VARIANTS["pvt_v2_b0"]
    config = PvtV2Config.from_dict({"hidden_sizes": row.embed_dims, "depths": row.depths, "num_labels": classes})
    torch.manual_seed(7)
    return dict(PvtV2ForImageClassification(config).state_dict())


@cache
def checkpoint(source: SourceName, classes: int = 1000) -> bytes:
    """The file that `source` would have of pvt_v2_b0."""
    state = dict(official(classes))
    if source == "official":
        return pickled(state)
    if source == "opengvlab":
        return save(transformers_state(classes))
    return save(in_timm(state) if source == "timm" else in_lucid(state))


def path_of(source: SourceName, url: int = 0) -> str:
    """Where a mirror has the file."""
    return "/" + B0.file(source).urls[url].split("/", 3)[3]
