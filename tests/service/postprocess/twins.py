"""Models of every variant in full, with random weights, beside transformers' implementation of the same."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PvtV2ForImageClassification

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.weights import load_into, remap_keys
from service.backends.base import Backend, Layout, Served
from service.backends.cpu import TorchBackend
from service.execution import executable as executable_module
from service.execution.executable import Executable, LoadReport
from service.execution.plan import BatchPlan
from service.execution.tuning import Tuned
from service.results import ImageResult, InferenceResult, Timing
from service.store.cards import ModelCard, Preprocessing, WeightsFile
from service.store.store import StoredModel
from tests.service.architecture.test_pvt_v2 import randomize, transformers_twin

IMAGES = 2


class Twin(NamedTuple):
    """Our module and theirs, with the same weights."""

    ours: PVT_V2
    theirs: PvtV2ForImageClassification


def make_twin(variant: str) -> Twin:
    theirs = transformers_twin(variant)
    randomize(theirs)
    with torch.device("meta"):
        ours = create(variant)
    load_into(ours, remap_keys(theirs.state_dict()))
    return Twin(ours.eval(), theirs.train(mode=False))


def executable_of(
    twin: Twin, variant: str, backend: Backend, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> Executable:
    """Ours as it is served, for batches of two; nothing is measured, and no weights are written and read."""
    height, width = size
    pixels = Preprocessing(height=height, width=width)
    card = ModelCard(
        id=f"{variant}.twin", variant=variant, labels=tuple(f"label {i}" for i in range(1000)), preprocessing=pixels,
        weights=WeightsFile(file="none.pth", sha256="0" * 64, bytes=1), parameters=1, licence="none", source="random",
    )  # fmt: skip
    monkeypatch.setattr(
        executable_module, "build", lambda _, __, stages=(): Served(twin.ours, pixels.mean, pixels.std, stages)
    )
    layout = Layout(1, 1)
    # The graph without stage maps is not called here, so it need not be compiled.
    plain = TorchBackend(1).program(Served(twin.ours, pixels.mean, pixels.std), height, width)
    graph = plain.graph(IMAGES, layout, "float32")
    tuned = Tuned("float32", layout, BatchPlan({IMAGES: 1.0}), {IMAGES: graph}, None, ())
    stored = StoredModel(card.id, "1", Path("/none"), card)
    return Executable(stored, backend, tuned, LoadReport(backend.name, "cpu", "float32", layout, (), False, 0, 0))


def answer(executable: Executable) -> InferenceResult:
    """What two random images give, stage maps too."""
    shape = (IMAGES, executable.height, executable.width, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    executable.add_stages()
    outputs = executable.run(0, list(images), stages=True)
    results = [
        ImageResult(1, 1, each, Timing(0, 0, 0, 0), pixels) for each, pixels in zip(outputs, images, strict=True)
    ]
    return InferenceResult(executable.card, "1", (executable.height, executable.width), executable.head, [*results])


@torch.inference_mode()
def theirs(twin: Twin, answered: InferenceResult) -> Any:
    """What transformers' model gives for the same images, which are normalised as their preprocessing does it."""
    pixels = np.stack([each.pixels for each in answered.results if isinstance(each, ImageResult)])
    mean, std = answered.card.preprocessing.mean, answered.card.preprocessing.std
    x: NDArray[np.float64] = (pixels / 255 - mean) / std
    return twin.theirs(_to_maps(x), output_hidden_states=True)


def _to_maps(x: NDArray[np.float64]) -> Tensor:
    return torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2)
