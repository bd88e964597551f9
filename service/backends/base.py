"""What every backend offers."""

from collections.abc import Sequence
from threading import Event
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.arrays import Floats
from service.backends.served import Served

Precision = Literal["float32", "bfloat16", "float16"]
Batch = NDArray[np.uint8]  # (n, height, width, 3)
Blob = NDArray[np.uint8]  # (bytes,)


class Layout(NamedTuple):
    """How the cores are shared out: `streams` batches at a time, `threads` cores for each; one where a GPU computes."""

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

    def room(self, instance: int) -> Batch | None:
        """Where a batch for `instance` is best put together, to save a copy; None if that does not matter."""
        ...


class Program(Protocol):
    """A module given to a backend, from which graphs of several batch sizes are made."""

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:
        """The graph for batches of `size`; what the backend can't compile it raises as it comes."""
        ...

    def prepare(self, size: int, layout: Layout, precision: Precision, stopped: Event) -> None:
        """Do the part of `faster` that takes minutes; others may make graphs meanwhile. Only if `Backend.improves`.

        Returns early once `stopped` is set: then nobody wants it any more.
        """
        ...

    def faster(self, size: int, layout: Layout, precision: Precision) -> Graph:
        """The same graph as `graph`, with all that can be done for its speed. Only if `Backend.improves`."""
        ...


class Backend(Protocol):
    """Executes modules on `instances` executors, each of which runs one batch at a time.

    `device` is where: `cpu`, or names as torch has them. `precisions` are those worth trying there, the most promising
    first, float32 always last; `probe_size` is the batch size at which they are compared, `tuning_seconds` how long a
    first load may spend on compiling and timing. `exports` says whether its
    graphs have a compiled form, `improves` whether its programs have `faster` graphs.
    """

    name: str
    version: str
    device: str
    instances: int
    precisions: tuple[Precision, ...]
    probe_size: int
    tuning_seconds: float
    exports: bool
    improves: bool

    def layouts(self, cores: int) -> Sequence[Layout]:
        """The layouts to choose from on `cores`; the first is that with a stream for each instance."""
        ...

    def memory_bytes(self) -> int:
        """Memory in use where models lie, all models and what else there is, once what is free was given back."""
        ...

    def program(self, module: Served, height: int, width: int) -> Program:
        """Take `module` in, for pictures of `height` x `width`."""
        ...

    def restore(self, blob: Blob, layout: Layout, precision: Precision) -> Graph:
        """The graph whose `export` is `blob`, which it keeps; what is wrong with that it raises as it comes."""
        ...
