"""What every backend offers: from a module it makes a program, and from that a graph for each batch size."""

from collections.abc import Callable, Sequence
from threading import Event
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.backends.module import Served
from service.machine.memory import settled_bytes
from service.results import Floats

Precision = Literal["float32", "bfloat16", "float16"]
Batch = NDArray[np.uint8]  # (n, height, width, 3)
Blob = NDArray[np.uint8]  # (bytes,)


class Layout(NamedTuple):
    """How cores are shared out: `streams` batches run at a time, each on `threads` cores; on a GPU that is 1."""

    streams: int
    threads: int


class TuningOptions(NamedTuple):
    """How many `seconds` a first load may compile and measure, and the batch size at which it compares precisions."""

    seconds: float = 10.0
    probe_size: int = 1


class Graph(Protocol):
    """A module compiled for batches of one fixed shape; `precision` is what it really computes in."""

    precision: Precision

    def run(self, instance: int, batch: Batch) -> tuple[Floats, ...]:
        """Logits (n, classes), embedding (n, channels), and the stage maps that the module returns.

        Each `instance` makes one call at a time.

        Raises:
            OutOfMemory: the batch does not fit.
        """
        ...

    def input_buffer(self, instance: int) -> Batch | None:
        """Where to put the next batch of `instance`, which saves a copy; None if that makes no difference."""
        ...

    def export(self) -> bytes | None:
        """Its compiled form, from which `Backend.restore` makes it again; None if it has none."""
        ...


Restore = Callable[[Blob, Layout, Precision], Graph]


class OptimizedProgram(Protocol):
    """Makes faster graphs of a program, which take minutes to compile."""

    def prepare(self, size: int, precision: Precision, stopped: Event) -> None:
        """Do the part of `graph` that takes minutes; graphs can be made meanwhile. Return early if `stopped` is set."""
        ...

    def graph(self, size: int, precision: Precision) -> Graph:
        """The faster graph for batches of `size`; `prepare` it first. Errors are the backend's own."""
        ...


class Program(Protocol):
    """A module given to a backend, which makes graphs of it."""

    @property
    def optimized(self) -> OptimizedProgram | None:
        """What makes faster graphs; None where `graph` does all that the backend can."""
        ...

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:
        """The graph for batches of `size`. Errors are the backend's own."""
        ...


class Backend(Protocol):
    """Executes modules on `instances` executors, each of which runs one batch at a time.

    `device` is `cpu`, or torch's names of GPUs. `precisions` are those worth trying there, the most promising first,
    float32 always last.
    """

    name: str
    version: str
    device: str
    instances: int
    precisions: tuple[Precision, ...]
    tuning: TuningOptions

    @property
    def restore(self) -> Restore | None:
        """Makes a graph from its exported form, and may keep that. None: its graphs have no such form."""
        ...

    def layouts(self, cores: int) -> Sequence[Layout]:
        """The layouts to choose from on `cores`; the first has a stream for each instance."""
        ...

    def memory_bytes(self) -> int:
        """Memory in use where models lie, of models and all else, after free memory was returned."""
        ...

    def program(self, module: Served, height: int, width: int) -> Program:
        """The program of `module` for images of `height` x `width`."""
        ...


class CpuBackend:
    """What the backends that run on a CPU have in common."""

    device = "cpu"
    tuning = TuningOptions()

    def __init__(self, instances: int) -> None:
        self.instances = instances

    def layouts(self, cores: int) -> Sequence[Layout]:
        """An even share of the cores for each instance, then layouts of fewer streams that use all cores.

        With one instance for each core, the number of streams halves down to one. If the number of instances was set
        by hand, the only other layout is one stream on all cores, for the latency graph.
        """
        base = Layout(self.instances, max(1, cores // self.instances))
        threads = [1 << i for i in range(1, cores.bit_length())] if self.instances == cores else []
        others = [Layout(cores // each, each) for each in threads if cores % each == 0]
        return tuple(dict.fromkeys([base, *others, Layout(1, cores)]))

    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        return settled_bytes()
