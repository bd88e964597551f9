"""A GPU as the CUDA backend sees it: modules are placed on it, and runs of one shape are captured and repeated.

`service.backends.cuda` decides what to run, this module how the card is told to. It is the only one that calls
`torch.cuda` to compute; tests put a CPU in its place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor, nn

from service.backends.base import Batch
from service.errors import OutOfMemory
from service.outputs import Floats
from service.served import Served

# Before a capture, so that what is decided or compiled in the first runs is not captured: torch's documentation asks
# for three on a stream of their own.
WARM_UPS = 3

Function = Callable[[Tensor], Sequence[Tensor]]


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
        """
        ...


class Device(Protocol):
    """A card, by the name that torch has for it. `bfloat16` says whether it computes in that."""

    name: str
    bfloat16: bool

    def place(self, module: Served, kind: torch.dtype, *, channels_last: bool) -> nn.Module:
        """A copy of `module` on the device, which computes in `kind` and takes uint8 pixels there, as `module` does."""
        ...

    def capture(self, function: Function, shape: tuple[int, ...], slots: int) -> Captured:
        """Make `function` ready for uint8 pixels of `shape`. It may compile in its first runs.

        Raises:
            OutOfMemory: it does not fit onto the device.
        """
        ...

    def memory_bytes(self) -> int:
        """What this process holds of the device's memory."""
        ...


class Placed(nn.Module):
    """A served module that computes in `kind`: uint8 pixels in, float32 out, as from the module itself."""

    def __init__(self, served: Served, kind: torch.dtype, *, channels_last: bool) -> None:
        super().__init__()
        self.served = served
        self.kind = kind
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.served.model.to(kind).to(memory_format=self.memory_format)  # type: ignore[call-overload]  # as documented

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """As `Served.forward`."""
        images = self.served.normalised(pixels).to(self.kind, memory_format=self.memory_format)
        return tuple(each.float() for each in self.served.answers(images))


class CudaDevice:
    """The card number `index`, whose runs all go through one stream, while copies have one for each slot.

    So a batch's pixels travel while another batch is computed, and its answers while the next one is.
    """

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.device = torch.device("cuda", index)
        with torch.cuda.device(self.device):
            self.bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.computing = torch.cuda.Stream()
            self._capturing = torch.cuda.Stream()
        # Held while work is put on the computing stream, for as long as a batch's parts must stay together there, and
        # while a graph is captured, which stands for those that must not be put there meanwhile.
        self.lock = Lock()

    def place(self, module: Served, kind: torch.dtype, *, channels_last: bool) -> nn.Module:
        """See `Device.place`."""
        with _memory_errors():
            return Placed(deepcopy(module).to(self.device), kind, channels_last=channels_last).eval()

    def capture(self, function: Function, shape: tuple[int, ...], slots: int) -> Captured:
        """See `Device.capture`."""
        with torch.cuda.device(self.device), torch.no_grad(), _memory_errors():
            pixels = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            self._capturing.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._capturing):
                for _ in range(WARM_UPS):
                    function(pixels)
            self._capturing.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may wait for events or start copies meanwhile, which a capture in the default mode forbids.
            capture = torch.cuda.graph(graph, stream=self._capturing, capture_error_mode="thread_local")
            with self.lock, capture:
                answers = tuple(function(pixels))
            rooms = [_Slot.make(self.device, pixels, answers) for _ in range(slots)]
        return _Captured(self, graph, pixels, answers, rooms, function)

    def memory_bytes(self) -> int:
        """See `Device.memory_bytes`; what torch keeps for later counts, so give that back first."""
        return torch.cuda.memory_reserved(self.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """Memory and streams for one batch on its way: pinned on this side, of its own on the card."""

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
    def make(cls, device: torch.device, pixels: Tensor, answers: Sequence[Tensor]) -> "_Slot":
        here = torch.zeros(pixels.shape, dtype=pixels.dtype, pin_memory=True)  # without, copies would wait for the host
        return cls(
            here=here,
            there=torch.empty_like(pixels),
            answers_there=tuple(torch.empty(each.shape, dtype=each.dtype, device=device) for each in answers),
            answers_here=tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in answers),
            room=here.numpy(),
            copying=torch.cuda.Stream(),
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
        with torch.cuda.device(self.device.device), torch.no_grad(), _memory_errors():
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
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"it does not fit into the GPU's memory: {error}") from error


def cuda_devices(names: Sequence[str]) -> list[CudaDevice]:
    """The cards called `names`.

    Raises:
        RuntimeError: what torch says of one that can't be used.
    """
    torch.backends.cudnn.benchmark = True  # shapes are fixed, and what is chosen before a capture stays
    torch.backends.cudnn.allow_tf32 = False  # float32 is asked for where less was too far off
    return [CudaDevice(torch.device(name).index) for name in names]
