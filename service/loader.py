"""From a model in the store to one that can run: module, weights, graphs, batch plan. Blocking; takes seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from service.backends.base import Backend, Graph, Precision, Program, Served
from service.cards import ModelCard
from service.errors import CardInvalid, ModelLoadFailed
from service.outputs import Outputs
from service.plan import BatchPlan, measure
from service.pvt_v2 import PVT_V2, create
from service.store import StoredModel
from service.weights import load_weights

Pixels = NDArray[np.uint8]  # (height, width, 3)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a model was loaded.

    `memory_bytes` is what the process's resident memory grew by meanwhile, and at least the size of the weights, since
    growth that fits into memory freed before is not seen.
    """

    backend: str
    precision: Precision
    load_seconds: float
    memory_bytes: int


class Executable:
    """A loaded model: runs batches of up to the plan's largest size."""

    def __init__(self, stored: StoredModel, plan: BatchPlan, graphs: dict[int, Graph], report: LoadReport) -> None:
        self.stored = stored
        self.card = stored.require_card()
        self.plan = plan
        self.report = report
        self._graphs = graphs

    def run(self, instance: int, images: Sequence[Pixels], *, alone: bool = False) -> list[Outputs]:  # noqa: ARG002
        """The outputs of `images`, in their order; one call at a time for each `instance`.

        `alone`: nothing else runs or waits.
        """
        logits, embedding = self._graph(len(images)).run(instance, _stack(images, self._padded(len(images))))
        return [Outputs(logits[i], embedding[i]) for i in range(len(images))]

    def _padded(self, n: int) -> int:
        return self.plan.padded(n)

    def _graph(self, n: int) -> Graph:
        return self._graphs[self._padded(n)]


def load(stored: StoredModel, backend: Backend, max_batch_size: int) -> Executable:
    """Load `stored` on `backend` and measure its batch plan up to `max_batch_size`.

    Raises:
        ModelLoadFailed: the card or the weights are wrong; the message says how.
    """
    start, memory = perf_counter(), _resident_bytes()
    card = stored.require_card()
    program = _program(card, _module(card, stored.folder), backend)
    plan, graphs = _graphs(card, program, max_batch_size)
    grown = max(card.weights.bytes, _resident_bytes() - memory)
    report = LoadReport(backend.name, program.precision, perf_counter() - start, grown)
    return Executable(stored, plan, graphs, report)


def _module(card: ModelCard, folder: Path) -> PVT_V2:
    # On the meta device the module costs no memory and no random numbers: every tensor comes from the file.
    with torch.device("meta"):
        model = create(card.variant, num_classes=len(card.labels))
    load_weights(model, folder / card.weights.file, sha256=card.weights.sha256)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != card.parameters:
        raise CardInvalid(f"{folder}: the card says {card.parameters} parameters, the weights have {parameters}")
    return model.eval()


def _program(card: ModelCard, model: PVT_V2, backend: Backend) -> Program:
    pixels = card.preprocessing
    return backend.program(Served(model, pixels.mean, pixels.std), pixels.height, pixels.width)


def _graphs(card: ModelCard, program: Program, max_batch_size: int) -> tuple[BatchPlan, dict[int, Graph]]:
    graphs: dict[int, Graph] = {}
    random = np.random.default_rng(0)

    def prepare(size: int) -> Callable[[], object]:
        graphs[size] = program.graph(size)
        shape = (size, card.preprocessing.height, card.preprocessing.width, 3)
        batch = random.integers(0, 256, shape, dtype=np.uint8)
        if not all(np.isfinite(part).all() for part in graphs[size].run(0, batch)):
            raise ModelLoadFailed(f"{card.id} gives NaN or infinity; check its weights and the card's mean and std")
        return lambda: graphs[size].run(0, batch)

    plan = measure(prepare, max_batch_size)
    return plan, {size: graphs[size] for size in plan.sizes}


def _stack(images: Sequence[Pixels], size: int) -> NDArray[np.uint8]:
    """(size, height, width, 3), the places behind the images left black. One image alone is not copied."""
    if len(images) == size == 1:
        return images[0][np.newaxis]
    batch = np.zeros((size, *images[0].shape), dtype=np.uint8)
    np.stack(images, out=batch[: len(images)])
    return batch


def _resident_bytes() -> int:
    resident: int = psutil.Process().memory_info().rss
    return resident
