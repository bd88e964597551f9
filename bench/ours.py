"""The only module of the measurements that calls the engine's loader and backends."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.weights import load_into, remap_keys
from service.backends.base import Layout, Served, build
from service.backends.cpu import OpenVinoBackend
from service.backends.cuda import IN_FLIGHT, CudaBackend, CudaDevice, cuda_devices
from service.backends.cuda_compiling import TorchCompiler
from service.execution.executable import Executable
from service.execution.tuning import Limits
from service.images.decoding import decode
from service.options import EngineOptions, make_backends
from service.registry.loader import load
from service.store.store import Store

Pixels = NDArray[np.uint8]  # (height, width, 3)
SIDE = 224


class Ours:
    """A model of a store, loaded as the server loads it: by default an instance of one thread for each core."""

    def __init__(self, store: str | Path, instances: int | None = None) -> None:
        """`store` holds one model."""
        options = EngineOptions(model_store=Path(store), default_model="")
        self.instances = instances or options.instances
        options = EngineOptions(
            model_store=Path(store), default_model="", instances=self.instances, cores=self.instances
        )
        (stored,) = Store(options.model_store).models()
        self._max_pixels = options.max_image_pixels
        self._executable: Executable = load(stored, make_backends(options), Limits(self.instances))
        self.precision: str = self._executable.report.precision
        self.batch: int = self._executable.plan.largest

    def decode(self, image: bytes) -> Pixels:
        """The model's input."""
        geometry = self._executable.card.preprocessing.geometry
        return decode(image, geometry, max_pixels=self._max_pixels).pixels

    def infer(self, instance: int, images: Sequence[Pixels]) -> None:
        """Run `images` in batches of the sizes that the plan found best."""
        plan = self._executable.plan
        while images:
            n = plan.best(len(images))
            self._executable.run(instance, images[:n])
            images = images[n:]

    def on_all(self, work: Callable[[int], None]) -> None:
        """Call `work` for each instance at the same time, each on its thread; what one raises is raised."""
        failures: list[BaseException] = []

        def guarded(instance: int) -> None:
            try:
                work(instance)
            except BaseException as error:  # noqa: BLE001  handed on below
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(instance,)) for instance in range(self.instances)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


class Graphs:
    """Our fixed-shape graphs for every batch size up to `largest`, on one instance of `threads` threads."""

    def __init__(self, store: str | Path, largest: int, threads: int) -> None:
        """`store` holds one model."""
        (stored,) = Store(Path(store)).models()
        card = stored.require_card()
        backend = OpenVinoBackend(1)
        program = backend.program(build(card, stored.folder), card.preprocessing.height, card.preprocessing.width)
        layout, precision = Layout(1, threads), backend.precisions[0]
        self._graphs = {size: program.graph(size, layout, precision) for size in range(1, largest + 1)}

    def logits(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, classes) of a batch (n, height, width, 3)."""
        logits, _ = self._graphs[len(batch)].run(0, batch)
        return logits


def module(variant: str) -> PVT_V2:
    """Our module with seeded weights, as others are given it."""
    torch.manual_seed(0)
    return create(variant, num_classes=1000).eval()


class OnDevice:
    """Our module on a GPU, for batches of one size, compiled as the server does it, in the precision that earns it.

    `instances` batches may be on their way at a time.
    """

    instances = IN_FLIGHT

    def __init__(
        self,
        device: CudaDevice,
        model: tuple[str, Mapping[str, Tensor]],
        batch: int,
        normalisation: tuple[Sequence[float], Sequence[float]],
        compiler: TorchCompiler | None = None,
    ) -> None:
        """`model` is a variant and its weights, transformers' or ours; `normalisation` mean and standard deviation.

        `compiler` is torch.compile unless given.

        Raises:
            OutOfMemory: the batch does not fit onto the device.
        """
        with torch.device("meta"):
            made = create(model[0])
        load_into(made, remap_keys(model[1]))
        backend = CudaBackend([device], self.instances, compiler or TorchCompiler(None))
        optimized = backend.program(Served(made, *normalisation).eval(), SIDE, SIDE).optimized
        assert optimized  # noqa: S101  there is a compiler
        self.precision = backend.precisions[0]
        self._graph = optimized.graph(batch, self.precision)

    def run(self, instance: int, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits (n, classes) of a batch (n, 224, 224, 3)."""
        return self._graph.run(instance, batch)[0]


def cuda_device(name: str) -> CudaDevice:
    """The card called `name`, as the server uses it."""
    return cuda_devices([name])[0]
