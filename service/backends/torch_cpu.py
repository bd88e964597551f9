"""The torch backend: the module itself, eager, on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from service.backends.base import Batch, CpuBackend, Graph, Layout, Precision, Program, Restore
from service.backends.module import Served
from service.errors import OutOfMemory
from service.results import Floats


class TorchBackend(CpuBackend):
    """Runs the module as it is. It does not try bfloat16: on a CPU, eager, that gains too little for its error."""

    name = "torch"
    version: str = torch.__version__
    precisions: tuple[Precision, ...] = ("float32",)
    restore: Restore | None = None

    def program(self, module: Served, height: int, width: int) -> Program:  # noqa: ARG002  eager takes any size
        """The program of `module`, which runs as it is."""
        return _Program(module.eval())


class _Program:
    optimized = None

    def __init__(self, module: Served) -> None:
        self._module = module

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:  # noqa: ARG002  eager takes any size
        return _Graph(self._module, layout.threads, precision)


class _Graph:
    def __init__(self, module: Served, threads: int, precision: Precision) -> None:
        self.precision = precision
        self._module = module
        self._threads = threads

    def run(self, instance: int, batch: Batch) -> tuple[Floats, ...]:  # noqa: ARG002
        torch.set_num_threads(self._threads)  # of the calling thread, which is not ours to make
        reduced = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision)
        autocast = torch.autocast("cpu", reduced, enabled=reduced is not None)
        with _memory_errors(len(batch)), torch.inference_mode(), autocast:
            outputs = self._module(torch.tensor(batch))  # a copy: an image may be read-only
        return tuple(output.float().numpy() for output in outputs)

    def input_buffer(self, instance: int) -> None:  # noqa: ARG002
        return None

    def export(self) -> None:
        return None


@contextmanager
def _memory_errors(size: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU allocator has no exception type of its own.
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise OutOfMemory(f"a batch of {size} does not fit into memory") from error
        raise
