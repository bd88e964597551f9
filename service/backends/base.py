"""What every backend offers."""

from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.outputs import Floats
from service.served import Served

Precision = Literal["float32", "bfloat16"]
Batch = NDArray[np.uint8]  # (n, height, width, 3)
Blob = NDArray[np.uint8]  # (bytes,)


class Layout(NamedTuple):
    """How the cores are shared out: `streams` batches at a time, `threads` cores for each."""

    streams: int
    threads: int


class Graph(Protocol):
    """A module made ready for batches of one fixed shape; `precision` is what it really computes in."""

    precision: Precision

    def run(self, instance: int, batch: Batch) -> tuple[Floats, ...]:
        """What the module gives: logits (n, classes), embedding (n, channels), and stage maps if it gives those.

        One call at a time for each `instance`.

        Raises:
            OutOfMemory: the batch does not fit.
        """
        ...

    def export(self) -> bytes | None:
        """Its compiled form, from which `Backend.restore` makes it again; None if it has none."""
        ...


class Program(Protocol):
    """A module given to a backend, from which graphs of several batch sizes are made."""

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:
        """The graph for batches of `size`; what the backend can't compile it raises as it comes."""
        ...


class Backend(Protocol):
    """Executes modules on `instances` executors, each of which runs one batch at a time.

    `precisions` are those worth trying on this machine, the most promising first, float32 always last.
    """

    name: str
    version: str
    instances: int
    precisions: tuple[Precision, ...]

    def program(self, module: Served, height: int, width: int) -> Program:
        """Take `module` in, for pictures of `height` x `width`."""
        ...

    def restore(self, blob: Blob, layout: Layout, precision: Precision) -> Graph:
        """The graph whose `export` is `blob`, which it keeps; what is wrong with that it raises as it comes."""
        ...
