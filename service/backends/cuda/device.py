"""A GPU as the CUDA backend sees it: it places modules there, and captures runs of one shape to repeat them.

`service.backends.cuda.backend` decides what runs; this module makes the card do it. Only this module calls
`torch.cuda` to compute; tests put a CPU in its place. What a capture needs around it is from torch 2.13's source
(decision 49).
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn

from service.backends.base import Batch
from service.backends.cuda.compiling import Function, Placed, set_up_cudnn
from service.backends.module import Served
from service.errors import DeviceFailed, OutOfMemory
from service.results import Floats

# Before a capture, so that it does not capture what the first runs decide or compile. torch's documentation asks for
# three, on a separate stream.
WARM_UPS = 3
# Streams come from pools, one for each priority, and are handed out again after 32: a stream that nothing else may
# share has a pool to itself.
COMPUTING, COPYING = -1, -2
# One capture at a time in the process: a warm-up for another synchronises the device, which no capture survives.
_CAPTURING = Lock()


class CudaDevice:
    """The card number `index`. `name` is torch's name for it; `bfloat16` says whether it computes in that.

    All runs go through one stream, and each slot has a stream for its copies. So the pixels of one batch travel while
    another is computed, and its outputs while the next one is.
    """

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.device = torch.device("cuda", index)
        with torch.cuda.device(self.device):
            self.bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.computing = torch.cuda.Stream(priority=COMPUTING)
            self.capturing = torch.cuda.Stream(priority=COMPUTING)
        # Held while a batch's work is put on the computing stream, where it must stay together.
        self.lock = Lock()
        # Mutable state: the stream of each slot number, which all captured functions share.
        self._copying: list[torch.cuda.Stream] = []

    def place(self, module: Served, kind: torch.dtype) -> nn.Module:
        """A copy of `module` on the card that computes in `kind` and takes uint8 pixels there, as `module` does."""
        with _cuda_errors(self.name):
            return Placed(deepcopy(module).to(self.device), kind).eval()

    def capture(self, function: Function, shape: tuple[int, ...], slots: int) -> "Captured":
        """Capture `function` for uint8 pixels of `shape`; its first runs may compile it.

        Raises:
            OutOfMemory: it does not fit onto the device.
            DeviceFailed: the device no longer works.
        """
        with _CAPTURING, torch.cuda.device(self.device), torch.no_grad(), _cuda_errors(self.name):
            pixels = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            warming = torch.cuda.Stream()
            warming.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warming):
                for _ in range(WARM_UPS):
                    function(pixels)
            warming.synchronize()
            return Captured(self, function, pixels, slots)

    def copying(self, slot: int) -> torch.cuda.Stream:
        """The stream for copies of slot number `slot`."""
        while len(self._copying) <= slot:
            self._copying.append(torch.cuda.Stream(priority=COPYING))
        return self._copying[slot]

    def memory_bytes(self) -> int:
        """Memory of the card that torch has reserved; what it keeps for later counts, so return that first."""
        return torch.cuda.memory_reserved(self.device)


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """Memory and a stream for one batch in flight: page-locked memory of the host, and memory of the card."""

    host_pixels: Tensor
    card_pixels: Tensor
    card_outputs: tuple[Tensor, ...]
    host_outputs: tuple[Tensor, ...]
    input_buffer: Batch  # `host_pixels` as an array
    copying: torch.cuda.Stream
    arrived: torch.cuda.Event
    computed: torch.cuda.Event
    done: torch.cuda.Event

    @classmethod
    def make(cls, copying: torch.cuda.Stream, pixels: Tensor, outputs: Sequence[Tensor]) -> "_Slot":
        # Without page-locked memory, copies would wait for the host.
        host_pixels = torch.zeros(pixels.shape, dtype=pixels.dtype, pin_memory=True)
        return cls(
            host_pixels=host_pixels,
            card_pixels=torch.empty_like(pixels),
            card_outputs=tuple(torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in outputs),
            host_outputs=tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in outputs),
            input_buffer=host_pixels.numpy(),
            copying=copying,
            arrived=torch.cuda.Event(),
            computed=torch.cuda.Event(),
            done=torch.cuda.Event(blocking=True),  # a thread that waits sleeps: decoding needs its core
        )


class Captured:
    """A function captured for one shape as a CUDA graph. It has several slots, each for one batch in flight."""

    def __init__(self, device: CudaDevice, function: Function, pixels: Tensor, slots: int) -> None:
        """Capture `function` on `device`, which is warmed up; `pixels` become the graph's fixed input."""
        self._device = device
        self._function = function  # the graph's kernels belong to it
        self._pixels = pixels
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on serving, which a capture in the default mode forbids.
        capture = torch.cuda.graph(self._graph, stream=device.capturing, capture_error_mode="thread_local")
        # The outermost context puts the thread's stream back where a failed capture does not.
        with torch.cuda.stream(device.capturing), _no_garbage(), _own_workspace():
            self._outputs = _outputs_while(capture, function, pixels)
        self._slots = [_Slot.make(device.copying(i), pixels, self._outputs) for i in range(slots)]

    def input_buffer(self, slot: int) -> Batch:
        """Where to put the pixels of the slot's next batch."""
        return self._slots[slot].input_buffer

    def run(self, slot: int) -> tuple[Floats, ...]:
        """The function's outputs for the batch in the slot's input buffer; blocks until they are copied back.

        Raises:
            OutOfMemory: it does not fit onto the device.
            DeviceFailed: the device no longer works.
        """
        mine, device, computing = self._slots[slot], self._device, self._device.computing
        with torch.cuda.device(device.device), torch.no_grad(), _cuda_errors(device.name):
            with torch.cuda.stream(mine.copying):
                mine.card_pixels.copy_(mine.host_pixels, non_blocking=True)
                mine.arrived.record()
            with device.lock, torch.cuda.stream(computing):
                computing.wait_event(mine.arrived)
                self._pixels.copy_(mine.card_pixels)
                self._graph.replay()
                for kept, output in zip(mine.card_outputs, self._outputs, strict=True):
                    kept.copy_(output)
                mine.computed.record()
            with torch.cuda.stream(mine.copying):
                mine.copying.wait_event(mine.computed)
                for copied, kept in zip(mine.host_outputs, mine.card_outputs, strict=True):
                    copied.copy_(kept, non_blocking=True)
                mine.done.record()
            mine.done.synchronize()
        # Copies: the slot's next batch overwrites its outputs.
        return tuple(each.numpy().copy() for each in mine.host_outputs)


def _outputs_while(capture: AbstractContextManager[None], function: Function, pixels: Tensor) -> tuple[Tensor, ...]:
    """Call `function` while `capture` lasts. An error of the function comes before one of ending the capture."""
    failure: Exception | None = None
    outputs: tuple[Tensor, ...] = ()
    try:
        with capture:
            try:
                outputs = tuple(function(pixels))
            except Exception as error:  # noqa: BLE001  raised below
                failure = error
    except RuntimeError:
        if failure is None:
            raise
    if failure:
        raise failure
    return outputs


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect garbage first, then not: freeing another graph or a lost kernel would break a capture under way."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _own_workspace() -> Iterator[None]:
    """Make a captured graph allocate cuBLAS's workspace in its own memory pool.

    A graph keeps the address of the workspace it was captured with. That of the stream is freed together with any
    other graph that was captured there. torch's own `_inductor/cudagraph_trees.py` does the same.
    """
    torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001  there is no public way
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001  there is no public way


@contextmanager
def _cuda_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        # Of page-locked memory, or of memory for a graph, the second kind says so too.
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise OutOfMemory(f"it does not fit into the GPU's memory: {error}") from error
        if "captur" in str(error):  # it could not be captured, which says nothing about the card
            raise
        first = str(error).partition("\n")[0]
        raise DeviceFailed(f"{name} failed with {first}; restart the service, and look at nvidia-smi") from error


def cuda_devices(names: Sequence[str]) -> list[CudaDevice]:
    """The cards called `names`.

    Raises:
        RuntimeError: torch can't use one; the message is torch's.
    """
    set_up_cudnn()
    return [CudaDevice(torch.device(name).index) for name in names]
