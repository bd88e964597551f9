"""The torch backend on GPUs: a CUDA graph for each batch size, at first of the eager module, later of the compiled one.

Capturing the eager module takes milliseconds, so a model answers within seconds; `torch.compile` takes minutes, and its
graphs take the place of those when they are there (`service.execution.improving`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn

from service.arrays import Floats
from service.backends.base import Batch, Blob, Graph, Layout, Precision, Program
from service.backends.compiling import Compiler, Function, Job
from service.backends.device import Captured, Device
from service.backends.served import Served
from service.machine.memory import give_back

IN_FLIGHT = 2  # batches for each card: one is computed, another one travels
PROBE_SIZE = 8  # a batch of one leaves a card mostly idle, and says little of what is faster
TUNING_SECONDS = 60.0  # first runs on a card load libraries and choose kernels; a batch size itself takes little
_KINDS: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class CudaBackend:
    """Runs modules on `devices`, which take turns: instance number i is on the i-th of them, over and over."""

    name = "torch"
    probe_size = PROBE_SIZE
    tuning_seconds = TUNING_SECONDS
    exports = False  # a CUDA graph lives and dies with its process; what torch.compile made is on disk

    def __init__(self, devices: Sequence[Device], instances: int, compiler: Compiler | None) -> None:
        """`compiler` makes modules faster; None leaves them eager."""
        self.instances = instances
        self.devices = tuple(devices[:instances])
        self.compiler = compiler
        self.improves = compiler is not None
        self.version = str(torch.__version__)
        self.device = ", ".join(device.name for device in self.devices)
        reduced: tuple[Precision, ...] = ("bfloat16", "float16")
        known = reduced if all(device.bfloat16 for device in self.devices) else reduced[1:]
        self.precisions: tuple[Precision, ...] = (*known, "float32")

    def layouts(self, cores: int) -> Sequence[Layout]:  # noqa: ARG002
        """One: cores have no part in it. A batch is computed at a time on each device, whatever else is on its way."""
        return [Layout(len(self.devices), 1)]

    def memory_bytes(self) -> int:
        """Memory of the cards that this process holds."""
        give_back()
        return sum(device.memory_bytes() for device in self.devices)

    def program(self, module: Served, height: int, width: int) -> Program:
        """See `Backend.program`."""
        return _Program(self, module, height, width)

    def restore(self, blob: Blob, layout: Layout, precision: Precision) -> Graph:
        """Never called: nothing is exported."""
        raise NotImplementedError(f"{len(blob)} bytes, {layout}, {precision}: CUDA graphs are not cached")


class _Program:
    def __init__(self, backend: CudaBackend, module: Served, height: int, width: int) -> None:
        self._backend = backend
        self._module = module
        self._image = (height, width, 3)
        # Mutable state: the module on each device, as long as a graph of it lives.
        self._placed: WeakValueDictionary[tuple[int, Precision], nn.Module] = WeakValueDictionary()

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:  # noqa: ARG002
        return self._captured(size, precision, lambda module: module)

    def prepare(self, size: int, layout: Layout, precision: Precision, stopped: Event) -> None:  # noqa: ARG002
        for device in self._backend.devices:
            job = Job(self._module, _KINDS[precision], (size, *self._image), device.name)
            self._compiler.prepare(job, stopped)

    def faster(self, size: int, layout: Layout, precision: Precision) -> Graph:  # noqa: ARG002
        return self._captured(size, precision, self._compiler)

    @property
    def _compiler(self) -> Compiler:
        assert self._backend.compiler  # noqa: S101  else nobody asks for what is faster
        return self._backend.compiler

    def _captured(self, size: int, precision: Precision, compile_: Callable[[nn.Module], Function]) -> Graph:
        devices, shape = self._backend.devices, (size, *self._image)
        captured = []
        for i, device in enumerate(devices):
            module = self._on(i, precision)
            slots = len(range(i, self._backend.instances, len(devices)))
            captured.append(_Kept(device.capture(compile_(module), shape, slots), module))
        return _OnDevices(precision, captured)

    def _on(self, device: int, precision: Precision) -> nn.Module:
        key = (device, precision)
        if (placed := self._placed.get(key)) is None:
            placed = self._placed[key] = self._backend.devices[device].place(self._module, _KINDS[precision])
        return placed


@dataclass(frozen=True, slots=True)
class _Kept:
    """A captured run, and the module whose weights it reads where they lay when it was captured."""

    captured: Captured
    module: nn.Module


class _OnDevices:
    def __init__(self, precision: Precision, captured: Sequence[_Kept]) -> None:
        self.precision = precision
        self._captured = captured

    def run(self, instance: int, batch: Batch) -> tuple[Floats, ...]:
        captured, slot = self._of(instance)
        room = captured.room(slot)
        if batch is not room:
            np.copyto(room, batch)
        return captured.run(slot)

    def export(self) -> None:
        return None

    def room(self, instance: int) -> Batch:
        captured, slot = self._of(instance)
        return captured.room(slot)

    def _of(self, instance: int) -> tuple[Captured, int]:
        slot, device = divmod(instance, len(self._captured))
        return self._captured[device].captured, slot
