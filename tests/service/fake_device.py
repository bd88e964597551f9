"""A CPU in the place of a GPU."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from service.backends.base import Batch, Served
from service.backends.cuda import Captured, CudaDevice
from service.backends.cuda_compiling import Function, Placed
from service.errors import OutOfMemory
from service.results import Floats


@dataclass(eq=False)
class FakeDevice(CudaDevice):
    """Runs at once, in the caller's thread. Batches of more than `largest` don't fit.

    It computes in float32 unless `emulates`, because a CPU without 16-bit instructions takes a hundred times as long.
    `on_run` is called with each run's function and batch size. `placed` and `captured` record the calls.
    """

    name: str = "cuda:0"
    bfloat16: bool = True
    emulates: bool = False
    largest: int = 1024
    memory: int = 0
    on_run: Callable[[Function, int], None] = lambda *_: None
    placed: list[torch.dtype] = field(default_factory=list)
    captured: list["FakeCaptured"] = field(default_factory=list)

    def place(self, module: Served, kind: torch.dtype) -> nn.Module:
        self.placed.append(kind)
        return Placed(deepcopy(module), kind if self.emulates else torch.float32).eval()

    def capture(self, function: Function, shape: tuple[int, ...], slots: int) -> Captured:
        if shape[0] > self.largest:
            raise OutOfMemory(f"a batch of {shape[0]} does not fit")
        with torch.no_grad():
            function(torch.zeros(shape, dtype=torch.uint8))  # as the warm-ups do, which compile
        captured = FakeCaptured(self, function, [np.zeros(shape, np.uint8) for _ in range(slots)])
        self.captured.append(captured)
        return captured

    def memory_bytes(self) -> int:
        return self.memory


@dataclass(eq=False)
class FakeCaptured(Captured):
    on: FakeDevice
    function: Function
    buffers: list[Batch]
    ran: list[int] = field(default_factory=list)

    def input_buffer(self, slot: int) -> Batch:
        return self.buffers[slot]

    def run(self, slot: int) -> tuple[Floats, ...]:
        self.ran.append(slot)
        self.on.on_run(self.function, len(self.buffers[slot]))
        torch.set_num_threads(1)  # of the calling thread; by default each new thread starts one for each core
        with torch.no_grad():
            return tuple(each.numpy() for each in self.function(torch.from_numpy(self.buffers[slot].copy())))
