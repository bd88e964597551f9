"""The torch backend on GPUs: a CUDA graph for each batch size, at first of the eager module, later of the compiled one.

Capturing the eager module takes milliseconds, so a model answers within seconds; `torch.compile` takes minutes, and its
graphs take the place of those when they are there (`service.improving`).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from service.backends.base import Batch, Blob, Graph, Layout, Precision, Program
from service.backends.device import Captured, Device
from service.memory import give_back
from service.outputs import Floats
from service.served import Served

IN_FLIGHT = 2  # batches for each card: one is computed, another one travels
PROBE_SIZE = 8  # a batch of one leaves a card mostly idle, and says little of what is faster
# Every batch size is a compiled form of its own, and so is every card, precision, input size and choice of stage maps.
COMPILED_FORMS = 1024
_KINDS: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_PROBE_RUNS = 5

Compile = Callable[[nn.Module], Callable[[Tensor], Sequence[Tensor]]]


class CudaBackend:
    """Runs modules on `devices`, which take turns: instance number i is on the i-th of them, over and over."""

    name = "torch"
    probe_size = PROBE_SIZE
    exports = False  # a CUDA graph lives and dies with its process; what torch.compile made is on disk

    def __init__(self, devices: Sequence[Device], instances: int, compile_: Compile | None) -> None:
        """`compile_` makes a module faster; None leaves it eager."""
        self.instances = instances
        self.devices = tuple(devices[:instances])
        self.compile = compile_
        self.improves = compile_ is not None
        self.version = str(torch.__version__)
        self.device = ", ".join(device.name for device in self.devices)
        reduced: tuple[Precision, ...] = ("bfloat16", "float16")
        known = reduced if all(device.bfloat16 for device in self.devices) else reduced[1:]
        self.precisions: tuple[Precision, ...] = (*known, "float32")

    def layouts(self, cores: int) -> Sequence[Layout]:  # noqa: ARG002
        """One: cores have no part in it."""
        return [Layout(self.instances, 1)]

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
        # Mutable state: the module on each device as long as a graph of it lives, and, for each precision, whether
        # channels last is faster.
        self._placed: WeakValueDictionary[tuple[int, Precision, bool], nn.Module] = WeakValueDictionary()
        self._channels_last: dict[Precision, bool] = {}

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:  # noqa: ARG002
        if precision not in self._channels_last:
            self._channels_last[precision] = self._faster_format(precision)
        return self._captured(size, precision, lambda module: module, channels_last=self._channels_last[precision])

    def faster(self, size: int, layout: Layout, precision: Precision) -> Graph:  # noqa: ARG002
        assert self._backend.compile  # noqa: S101  else nobody asks
        # Channels last without asking: what a compiler makes of a memory format is not what eager kernels do.
        return self._captured(size, precision, self._backend.compile, channels_last=True)

    def _faster_format(self, precision: Precision) -> bool:
        seconds = {}
        for channels_last in (True, False):
            module = self._on(0, precision, channels_last=channels_last)
            captured = self._backend.devices[0].capture(module, (PROBE_SIZE, *self._image), 1)
            seconds[channels_last] = _seconds(captured)
        return seconds[True] <= seconds[False]

    def _captured(self, size: int, precision: Precision, compile_: Compile, *, channels_last: bool) -> Graph:
        devices, shape = self._backend.devices, (size, *self._image)
        captured = []
        for i, device in enumerate(devices):
            module = self._on(i, precision, channels_last=channels_last)
            slots = len(range(i, self._backend.instances, len(devices)))
            captured.append(_Kept(device.capture(compile_(module), shape, slots), module))
        return _OnDevices(precision, captured)

    def _on(self, device: int, precision: Precision, *, channels_last: bool) -> nn.Module:
        key = (device, precision, channels_last)
        if (placed := self._placed.get(key)) is None:
            kind = _KINDS[precision]
            placed = self._backend.devices[device].place(self._module, kind, channels_last=channels_last)
            self._placed[key] = placed
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


def _seconds(captured: Captured) -> float:
    times = []
    for _ in range(_PROBE_RUNS):
        start = perf_counter()
        captured.run(0)
        times.append(perf_counter() - start)
    return min(times)


def torch_compile(cache: Path | None) -> Compile:
    """`torch.compile` with all it can do but CUDA graphs, which are made here. What it compiled is kept in `cache`."""
    if cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "torch"))

    def compiled(module: nn.Module) -> Callable[[Tensor], Sequence[Tensor]]:
        dynamo = torch._dynamo.config  # noqa: SLF001  the documented place
        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = COMPILED_FORMS
        return torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)

    return compiled
