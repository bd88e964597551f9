"""A GPU as the CUDA backend sees it: modules are placed on it, and runs of one shape are captured and repeated.

`service.backends.cuda` decides what to run, this module how the card is told to. It is the only one that calls
`torch.cuda` to compute; tests put a CPU in its place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor, nn

from service.arrays import Floats
from service.backends.base import Batch
from service.backends.capturing import answers_while, no_garbage, own_workspace
from service.backends.compiling import Function, Placed, set_up_cudnn
from service.backends.served import Served
from service.errors import DeviceFailed, OutOfMemory

# Before a capture, so that what is decided or compiled in the first runs is not captured: torch's documentation asks
# for three on a stream of their own.
WARM_UPS = 3
# Streams come from pools, one for each priority, and are handed out again after 32: what must not share a stream with
# anybody has a pool to itself.
COMPUTING, COPYING = -1, -2
# One capture at a time in the process: warming up for another synchronises the device, which no capture survives.
_CAPTURING = Lock()


class Captured(Protocol):
    """A function made ready for one shape, with room for several batches on their way at the same time.

    Each has a slot; one batch at a time in each.
    """

    def room(self, slot: int) -> Batch:
        """Where the pixels of the slot's next batch are to be put."""
        ...

    def run(self, slot: int) -> tuple[Floats, ...]:
        """What the function gives for what is in the slot's room; blocks until it is here.

        Raises:
            OutOfMemory: it does not fit onto the device.
            DeviceFailed: the device does not work any more.
        """
        ...


class Device(Protocol):
    """A card, by the name that torch has for it. `bfloat16` says whether it computes in that."""

    name: str
    bfloat16: bool

    def place(self, module: Served, kind: torch.dtype) -> nn.Module:
        """A copy of `module` on the device, which computes in `kind` and takes uint8 pixels there, as `module` does."""
        ...

    def capture(self, function: Function, shape: tuple[int, ...], slots: int) -> Captured:
        """Make `function` ready for uint8 pixels of `shape`. It may compile in its first runs.

        Raises:
            OutOfMemory: it does not fit onto the device.
            DeviceFailed: the device does not work any more.
        """
        ...

    def memory_bytes(self) -> int:
        """What this process holds of the device's memory."""
        ...


class CudaDevice:
    """The card number `index`, whose runs all go through one stream, while copies have one for each slot.

    So a batch's pixels travel while another batch is computed, and its answers while the next one is.
    """

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.device = torch.device("cuda", index)
        with torch.cuda.device(self.device):
            self.bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.computing = torch.cuda.Stream(priority=COMPUTING)
            self._capturing = torch.cuda.Stream(priority=COMPUTING)
        # Held while a batch's parts are put on the computing stream: they must stay together there.
        self.lock = Lock()
        # Mutable state: the stream of each slot number, which all captured functions share.
        self._copying: list[torch.cuda.Stream] = []

    def place(self, module: Served, kind: torch.dtype) -> nn.Module:
        """See `Device.place`."""
        with _cuda_errors(self.name):
            return Placed(deepcopy(module).to(self.device), kind).eval()

    def capture(self, function: Function, shape: tuple[int, ...], slots: int) -> Captured:
        """See `Device.capture`."""
        with _CAPTURING, torch.cuda.device(self.device), torch.no_grad(), _cuda_errors(self.name):
            while len(self._copying) < slots:
                self._copying.append(torch.cuda.Stream(priority=COPYING))
            pixels = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            warming = torch.cuda.Stream()
            warming.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warming):
                for _ in range(WARM_UPS):
                    function(pixels)
            warming.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads go on serving, which a capture in the default mode forbids.
            capture = torch.cuda.graph(graph, stream=self._capturing, capture_error_mode="thread_local")
            # The outermost context puts the thread's stream back where a failed capture does not.
            with torch.cuda.stream(self._capturing), no_garbage(), own_workspace():
                answers = answers_while(capture, function, pixels)
            rooms = [_Slot.make(stream, pixels, answers) for stream in self._copying[:slots]]
        return _Captured(self, graph, pixels, answers, rooms, function)

    def memory_bytes(self) -> int:
        """See `Device.memory_bytes`; what torch keeps for later counts, so give that back first."""
        return torch.cuda.memory_reserved(self.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """Memory and a stream for one batch on its way: pinned on this side, of its own on the card."""

    here: Tensor
    there: Tensor
    answers_there: tuple[Tensor, ...]
    answers_here: tuple[Tensor, ...]
    room: Batch
    copying: torch.cuda.Stream
    arrived: torch.cuda.Event
    computed: torch.cuda.Event
    done: torch.cuda.Event

    @classmethod
    def make(cls, copying: torch.cuda.Stream, pixels: Tensor, answers: Sequence[Tensor]) -> "_Slot":
        here = torch.zeros(pixels.shape, dtype=pixels.dtype, pin_memory=True)  # without, copies would wait for the host
        return cls(
            here=here,
            there=torch.empty_like(pixels),
            answers_there=tuple(torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in answers),
            answers_here=tuple(torch.empty(a.shape, dtype=a.dtype, pin_memory=True) for a in answers),
            room=here.numpy(),
            copying=copying,
            arrived=torch.cuda.Event(),
            computed=torch.cuda.Event(),
            done=torch.cuda.Event(blocking=True),  # a thread that waits sleeps: decoding needs its core
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """A CUDA graph, its fixed input and output, and what the kernels in it belong to."""

    device: CudaDevice
    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    answers: tuple[Tensor, ...]
    slots: Sequence[_Slot]
    function: Function = field(repr=False)

    def room(self, slot: int) -> Batch:
        return self.slots[slot].room

    def run(self, slot: int) -> tuple[Floats, ...]:
        mine, computing = self.slots[slot], self.device.computing
        with torch.cuda.device(self.device.device), torch.no_grad(), _cuda_errors(self.device.name):
            with torch.cuda.stream(mine.copying):
                mine.there.copy_(mine.here, non_blocking=True)
                mine.arrived.record()
            with self.device.lock, torch.cuda.stream(computing):
                computing.wait_event(mine.arrived)
                self.pixels.copy_(mine.there)
                self.graph.replay()
                for kept, answer in zip(mine.answers_there, self.answers, strict=True):
                    kept.copy_(answer)
                mine.computed.record()
            with torch.cuda.stream(mine.copying):
                mine.copying.wait_event(mine.computed)
                for given, kept in zip(mine.answers_here, mine.answers_there, strict=True):
                    given.copy_(kept, non_blocking=True)
                mine.done.record()
            mine.done.synchronize()
        # Copies: the slot's own are overwritten by its next batch.
        return tuple(given.numpy().copy() for given in mine.answers_here)


@contextmanager
def _cuda_errors(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"it does not fit into the GPU's memory: {error}") from error
    except torch.AcceleratorError as error:
        if "out of memory" in str(error):  # of pinned memory, or of memory for a graph
            raise OutOfMemory(f"it does not fit into the GPU's memory: {error}") from error
        if "captur" in str(error):  # it could not be captured, which says nothing of the card
            raise
        first = str(error).partition("\n")[0]
        raise DeviceFailed(f"{name} failed with {first}; restart the service, and look at nvidia-smi") from error


def cuda_devices(names: Sequence[str]) -> list[CudaDevice]:
    """The cards called `names`.

    Raises:
        RuntimeError: what torch says of one that can't be used.
    """
    set_up_cudnn()
    return [CudaDevice(torch.device(name).index) for name in names]
