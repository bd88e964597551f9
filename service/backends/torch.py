"""The torch backend: the module itself, eager, on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from service.backends.base import Batch, Graph, Precision, Program, Served
from service.errors import OutOfMemory
from service.outputs import Floats


class TorchBackend:
    """Runs the module as it is, with `threads` intra-op threads for each instance."""

    name = "torch"

    def __init__(self, instances: int, threads: int, precision: Precision | None = None) -> None:
        """`precision` None means float32: eager bfloat16 on a CPU gains nothing that its error would be worth."""
        self.instances = instances
        self._threads = threads
        self._precision: Precision = precision or "float32"

    def program(self, module: Served, height: int, width: int) -> Program:  # noqa: ARG002  eager takes any size
        """See `Backend.program`."""
        return _Eager(module.eval(), self._threads, self._precision)


class _Eager:
    """Program and graph in one: an eager module has no shape to be compiled for."""

    def __init__(self, module: Served, threads: int, precision: Precision) -> None:
        self.precision = precision
        self._module = module
        self._threads = threads

    def graph(self, size: int) -> Graph:  # noqa: ARG002
        return self

    def run(self, instance: int, batch: Batch) -> tuple[Floats, Floats]:  # noqa: ARG002
        torch.set_num_threads(
            self._threads
        )  # counts for the calling thread, and instances' threads are not ours to make
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16")
        with _memory_errors(len(batch)), torch.inference_mode(), autocast:
            logits, embedding = self._module(torch.tensor(batch))  # a copy: a picture may be read-only
        return logits.float().numpy(), embedding.float().numpy()


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
