"""A CPU in the place of a GPU."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from service.arrays import Floats
from service.backends.base import Batch
from service.backends.compiling import Function, Placed
from service.backends.device import Captured
from service.backends.served import Served
from service.errors import OutOfMemory


@dataclass(eq=False)
class FakeDevice:
    """Runs at once, in the caller's thread. Batches of more than `largest` don't fit.

    It computes in float32 unless `emulates`, since 16 bits take a CPU that has not got them a hundred times as long.
    `on_run` is told of each run: what runs, and its batch size. `placed` and `captured` say what was done to it.
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
class FakeCaptured:
    device: FakeDevice
    function: Function
    rooms: list[Batch]
    ran: list[int] = field(default_factory=list)

    def room(self, slot: int) -> Batch:
        return self.rooms[slot]

    def run(self, slot: int) -> tuple[Floats, ...]:
        self.ran.append(slot)
        self.device.on_run(self.function, len(self.rooms[slot]))
        torch.set_num_threads(1)  # counts for the calling thread; each new one would start as many as there are cores
        with torch.no_grad():
            return tuple(each.numpy() for each in self.function(torch.from_numpy(self.rooms[slot].copy())))
