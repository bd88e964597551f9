"""The torch backend: the module itself, eager, on the CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event

import torch

from service.arrays import Floats
from service.backends.base import Batch, Blob, Graph, Layout, Precision, Program
from service.backends.layouts import TUNING_SECONDS, base_layout, layouts
from service.backends.served import Served
from service.errors import OutOfMemory
from service.machine.memory import settled_bytes


class TorchBackend:
    """Runs the module as it is. Eager bfloat16 on a CPU gains nothing that its error would be worth: not tried."""

    name = "torch"
    version: str = torch.__version__
    device = "cpu"
    precisions: tuple[Precision, ...] = ("float32",)
    probe_size = 1
    tuning_seconds = TUNING_SECONDS
    exports = False
    improves = False

    def __init__(self, instances: int) -> None:
        self.instances = instances

    def layouts(self, cores: int) -> Sequence[Layout]:
        """See `Backend.layouts`."""
        return layouts(base_layout(self.instances, cores), cores)

    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        return settled_bytes()

    def program(self, module: Served, height: int, width: int) -> Program:  # noqa: ARG002  eager takes any size
        """See `Backend.program`."""
        return _Module(module.eval())

    def restore(self, blob: Blob, layout: Layout, precision: Precision) -> Graph:
        """Never called: an eager module exports nothing."""
        raise NotImplementedError(f"{len(blob)} bytes, {layout}, {precision}: eager modules are not cached")


class _Module:
    def __init__(self, module: Served) -> None:
        self._module = module

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:  # noqa: ARG002  eager takes any size
        return _Eager(self._module, layout.threads, precision)

    def prepare(self, size: int, layout: Layout, precision: Precision, stopped: Event) -> None:
        raise NotImplementedError

    def faster(self, size: int, layout: Layout, precision: Precision) -> Graph:
        raise NotImplementedError


class _Eager:
    def __init__(self, module: Served, threads: int, precision: Precision) -> None:
        self.precision = precision
        self._module = module
        self._threads = threads

    def run(self, instance: int, batch: Batch) -> tuple[Floats, ...]:  # noqa: ARG002
        # Counts for the calling thread, and instances' threads are not ours to make.
        torch.set_num_threads(self._threads)
        reduced = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision)
        autocast = torch.autocast("cpu", reduced, enabled=reduced is not None)
        with _memory_errors(len(batch)), torch.inference_mode(), autocast:
            outputs = self._module(torch.tensor(batch))  # a copy: a picture may be read-only
        return tuple(output.float().numpy() for output in outputs)

    def export(self) -> None:
        return None

    def room(self, instance: int) -> None:  # noqa: ARG002
        return None


@contextmanager
def _memory_errors(size: int) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"a batch of {size} does not fit into memory") from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # the CPU allocator has no exception type of its own
            raise OutOfMemory(f"a batch of {size} does not fit into memory") from error
        raise
