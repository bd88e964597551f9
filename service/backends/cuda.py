"""The torch backend on GPUs: a CUDA graph for each batch size, first of the eager module, later of the compiled one.

Capturing the eager module takes milliseconds, `torch.compile` minutes: it runs while the model serves (decision 48).
Only `CudaDevice` and `Captured` call `torch.cuda` to compute; tests put a CPU in their place. What a capture needs
around it is from torch 2.13's source (decision 49).
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from threading import Event, Lock
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from service.backends.base import (
    DTYPES,
    Backend,
    Batch,
    Graph,
    Images,
    Layout,
    OptimizedGraphs,
    Precision,
    Program,
    Served,
)
from service.backends.cuda_compiling import Function, Job, Placed, TorchCompiler, set_up_cudnn
from service.errors import BackendUnavailable, DeviceFailed, OutOfMemory
from service.machine import give_back
from service.results import Floats

IN_FLIGHT = 2  # batches for each card: one is computed while another is copied
# Before a capture, so that it does not capture what the first runs decide or compile. torch's documentation asks for
# three, on a separate stream.
WARM_UPS = 3
# Streams come from pools, one for each priority, and are handed out again after 32: a stream that nothing else may
# share has a pool to itself.
COMPUTING, COPYING = -1, -2
# One capture at a time in the process: a warm-up for another synchronises the device, which no capture survives.
_CAPTURING = Lock()


def visible() -> tuple[str, ...]:
    """The GPUs that this torch can use, by its names: `cuda:0` and so on."""
    return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()


def choose(setting: str, present: Sequence[str]) -> tuple[str, ...]:
    """The GPUs of those `present` that the setting selects; empty for the CPU.

    `setting` is `cpu`, `cuda` for every GPU, `auto` for every GPU if there are any, or names separated by commas.
    Raises BackendUnavailable if a GPU is missing.
    """
    if setting in {"auto", "cpu"}:
        return tuple(present) if setting == "auto" else ()
    names = tuple(present) or ("cuda:0",) if setting == "cuda" else tuple(dict.fromkeys(setting.split(",")))
    missing = [name for name in names if name not in present]
    if missing:
        seen = f"sees {', '.join(present)}" if present else "sees none"
        raise BackendUnavailable(
            f"PVT_DEVICE={setting}: torch {torch.__version__} {seen}, not {', '.join(missing)}; set PVT_DEVICE=cpu, or "
            "install a CUDA build of torch (docs/gpu.md) and check the driver with nvidia-smi"
        )
    return names


def cuda_devices(names: Sequence[str]) -> "list[CudaDevice]":
    """The cards called `names`; raises torch's RuntimeError if it can't use one."""
    set_up_cudnn()
    return [CudaDevice(torch.device(name).index) for name in names]


class CudaBackend(Backend):
    """Runs modules on `devices`, which take turns: instance number i is on device i modulo their number."""

    name = "torch"
    version = str(torch.__version__)
    tuning_seconds = 60.0  # first runs on a card load libraries and choose kernels
    probe_size = 8  # a batch of one leaves a card mostly idle, and says little about which precision is faster

    def __init__(self, devices: "Sequence[CudaDevice]", instances: int, compiler: TorchCompiler | None) -> None:
        """`compiler` makes modules faster; None leaves them eager."""
        self.instances = instances
        self.devices = tuple(devices[:instances])
        self.compiler = compiler
        self.device = ", ".join(device.name for device in self.devices)
        bfloat16 = all(device.bfloat16 for device in self.devices)
        self.precisions = ("bfloat16", "float16", "float32") if bfloat16 else ("float16", "float32")

    def layouts(self, cores: int) -> Sequence[Layout]:  # noqa: ARG002  cores make no difference
        """One: each device computes one batch at a time, however many are in flight."""
        return [Layout(len(self.devices), 1)]

    def memory_bytes(self) -> int:
        """Memory of the cards that this process holds."""
        give_back()
        return sum(device.memory_bytes() for device in self.devices)

    def program(self, module: Served, height: int, width: int) -> Program:
        """The program of `module`, which is copied to the devices when a graph is made."""
        graphs, optimized = _Graphs(self, module, (height, width, 3)), None
        if self.compiler:
            optimized = OptimizedGraphs(partial(graphs.prepare, self.compiler), partial(graphs.capture, self.compiler))
        return Program(lambda size, _, precision: graphs.capture(lambda placed: placed, size, precision), optimized)


class _Graphs:
    """Makes graphs of `module` for images of the shape `image`, eager ones and compiled ones."""

    def __init__(self, backend: CudaBackend, module: Served, image: tuple[int, ...]) -> None:
        self._backend = backend
        self._module = module
        self._image = image
        # Mutable state: the module on each device, as long as a graph of it lives.
        self._placed: WeakValueDictionary[tuple[int, Precision], nn.Module] = WeakValueDictionary()

    def prepare(self, compiler: TorchCompiler, size: int, precision: Precision, stopped: Event) -> None:
        for device in self._backend.devices:
            compiler.prepare(Job(self._module, DTYPES[precision], (size, *self._image), device.name), stopped)

    def capture(self, compile_: Callable[[nn.Module], Function], size: int, precision: Precision) -> Graph:
        devices, parts = self._backend.devices, []
        for i, device in enumerate(devices):
            if (module := self._placed.get((i, precision))) is None:
                module = self._placed[i, precision] = device.place(self._module, DTYPES[precision])
            slots = len(range(i, self._backend.instances, len(devices)))
            parts.append((device.capture(compile_(module), (size, *self._image), slots), module))
        return _Graph(precision, parts)


class _Graph(Graph):
    def __init__(self, precision: Precision, parts: "Sequence[tuple[Captured, nn.Module]]") -> None:
        """`parts`: a captured run for each device, and the module whose weights it reads from where they lay."""
        self.precision = precision
        self._parts = parts

    def run(self, instance: int, images: Images) -> tuple[Floats, ...]:
        slot, device = divmod(instance, len(self._parts))
        captured, _ = self._parts[device]
        np.stack([*images], out=captured.input_buffer(slot)[: len(images)])
        return captured.run(slot)


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
        # The stream for the copies of each slot number, made when first used: all captured functions share it.
        self.copying = defaultdict[int, torch.cuda.Stream](lambda: torch.cuda.Stream(priority=COPYING))

    def place(self, module: Served, kind: torch.dtype) -> nn.Module:
        """A copy of `module` on the card that computes in `kind` and takes uint8 pixels there, as `module` does."""
        with _cuda_errors(self.name):
            return Placed(deepcopy(module).to(self.device), kind).eval()

    def capture(self, function: Function, shape: tuple[int, ...], slots: int) -> "Captured":
        """Capture `function` for uint8 pixels of `shape`, which its first runs may compile.

        Raises OutOfMemory if it does not fit onto the device, and DeviceFailed if that no longer works.
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

    def memory_bytes(self) -> int:
        """Memory of the card that torch has reserved; what it keeps for later counts, so return that first."""
        return torch.cuda.memory_reserved(self.device)


class _Slot:
    """Memory and a stream for one batch in flight: page-locked memory of the host, and memory of the card."""

    def __init__(self, copying: torch.cuda.Stream, pixels: Tensor, outputs: Sequence[Tensor]) -> None:
        # Without page-locked memory, copies would wait for the host.
        self.host_pixels = torch.zeros(pixels.shape, dtype=pixels.dtype, pin_memory=True)
        self.input_buffer: Batch = self.host_pixels.numpy()
        self.card_pixels = torch.empty_like(pixels)
        self.card_outputs = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in outputs]
        self.host_outputs = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in outputs]
        self.copying = copying
        self.arrived = torch.cuda.Event()
        self.computed = torch.cuda.Event()
        self.done = torch.cuda.Event(blocking=True)  # a thread that waits sleeps: decoding needs its core


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
        failure: Exception | None = None
        try:
            # The outermost context puts the thread's stream back where a failed capture does not.
            with torch.cuda.stream(device.capturing), _undisturbed(), capture:
                try:
                    self._outputs = tuple(function(pixels))
                except Exception as error:
                    failure = error
                    raise
        except RuntimeError as error:  # perhaps that of ending a capture that failed
            raise failure or error from None
        self._slots = [_Slot(device.copying[i], pixels, self._outputs) for i in range(slots)]

    def input_buffer(self, slot: int) -> Batch:
        """Where to put the pixels of the slot's next batch."""
        return self._slots[slot].input_buffer

    def run(self, slot: int) -> tuple[Floats, ...]:
        """The function's outputs for the batch in the slot's input buffer, once they are copied back.

        Raises OutOfMemory and DeviceFailed, as a capture.
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


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What a capture needs: no garbage collection, and a cuBLAS workspace in the graph's own memory pool.

    To free another graph or a lost kernel would break a capture under way. A graph keeps the address of its workspace;
    the stream's would be freed with any other graph captured there, as torch's `_inductor/cudagraph_trees.py` knows.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001  there is no public way
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001  there is no public way
        if enabled:
            gc.enable()


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
