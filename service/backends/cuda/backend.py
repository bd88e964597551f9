"""The torch backend on GPUs: a CUDA graph for each batch size, first of the eager module, later of the compiled one.

Capturing the eager module takes milliseconds, so a model serves within seconds. `torch.compile` takes minutes;
`service.execution.optimizer` replaces the first graphs by compiled ones while the model serves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn

from service.backends.base import Batch, Graph, Layout, Precision, Program, TuningOptions
from service.backends.cuda.compiling import Compiler, Function, Job
from service.backends.cuda.device import Captured, CudaDevice
from service.backends.module import Served
from service.machine.memory import give_back
from service.results import Floats

IN_FLIGHT = 2  # batches for each card: one is computed while another is copied
_KINDS: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class CudaBackend:
    """Runs modules on `devices`, which take turns: instance number i is on device i modulo their number."""

    name = "torch"
    version = str(torch.__version__)
    # First runs on a card load libraries and choose kernels, hence the time. A batch of one leaves a card mostly idle,
    # and says little about which precision is faster.
    tuning = TuningOptions(seconds=60.0, probe_size=8)
    restore = None  # a CUDA graph lives and dies with its process; torch.compile's results are on disk

    def __init__(self, devices: Sequence[CudaDevice], instances: int, compiler: Compiler | None) -> None:
        """`compiler` makes modules faster; None leaves them eager."""
        self.instances = instances
        self.devices = tuple(devices[:instances])
        self.compiler = compiler
        self.device = ", ".join(device.name for device in self.devices)
        reduced: tuple[Precision, ...] = ("bfloat16", "float16")
        known = reduced if all(device.bfloat16 for device in self.devices) else reduced[1:]
        self.precisions: tuple[Precision, ...] = (*known, "float32")

    def layouts(self, cores: int) -> Sequence[Layout]:  # noqa: ARG002  cores make no difference
        """One: each device computes one batch at a time, however many are in flight."""
        return [Layout(len(self.devices), 1)]

    def memory_bytes(self) -> int:
        """Memory of the cards that this process holds."""
        give_back()
        return sum(device.memory_bytes() for device in self.devices)

    def program(self, module: Served, height: int, width: int) -> Program:
        """The program of `module`, which is copied to the devices when a graph is made."""
        return _Program(self, module, height, width)


class _Program:
    def __init__(self, backend: CudaBackend, module: Served, height: int, width: int) -> None:
        self.backend = backend
        self.module = module
        self.image = (height, width, 3)
        # Mutable state: the module on each device, as long as a graph of it lives.
        self._placed: WeakValueDictionary[tuple[int, Precision], nn.Module] = WeakValueDictionary()

    @property
    def optimized(self) -> "_Optimized | None":
        return _Optimized(self, self.backend.compiler) if self.backend.compiler else None

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:  # noqa: ARG002
        return self.capture(size, precision, lambda module: module)

    def capture(self, size: int, precision: Precision, compile_: Callable[[nn.Module], Function]) -> Graph:
        devices, shape = self.backend.devices, (size, *self.image)
        parts = []
        for i, device in enumerate(devices):
            module = self._on(i, precision)
            slots = len(range(i, self.backend.instances, len(devices)))
            parts.append(_Part(device.capture(compile_(module), shape, slots), module))
        return _Graph(precision, parts)

    def _on(self, device: int, precision: Precision) -> nn.Module:
        key = (device, precision)
        if (placed := self._placed.get(key)) is None:
            placed = self._placed[key] = self.backend.devices[device].place(self.module, _KINDS[precision])
        return placed


@dataclass(frozen=True, slots=True)
class _Optimized:
    program: _Program
    compiler: Compiler

    def prepare(self, size: int, precision: Precision, stopped: Event) -> None:
        for device in self.program.backend.devices:
            job = Job(self.program.module, _KINDS[precision], (size, *self.program.image), device.name)
            self.compiler.prepare(job, stopped)

    def graph(self, size: int, precision: Precision) -> Graph:
        return self.program.capture(size, precision, self.compiler)


@dataclass(frozen=True, slots=True)
class _Part:
    """A captured run on one device, and the module whose weights it reads from where they lay during the capture."""

    captured: Captured
    module: nn.Module


class _Graph:
    def __init__(self, precision: Precision, parts: Sequence[_Part]) -> None:
        self.precision = precision
        self._parts = parts

    def run(self, instance: int, batch: Batch) -> tuple[Floats, ...]:
        captured, slot = self._of(instance)
        buffer = captured.input_buffer(slot)
        if batch is not buffer:
            np.copyto(buffer, batch)
        return captured.run(slot)

    def input_buffer(self, instance: int) -> Batch:
        captured, slot = self._of(instance)
        return captured.input_buffer(slot)

    def export(self) -> None:
        return None

    def _of(self, instance: int) -> tuple[Captured, int]:
        slot, device = divmod(instance, len(self._parts))
        return self._parts[device].captured, slot
