"""CUDA's streams and events without a GPU, and as unkind as they are allowed to be.

Work on a stream does not run until a caller waits for a later event on it. Then it runs, after everything that it had
to wait for. Nothing else runs, so a read that is too early finds old data. Where streams are `mixed`, work of another
stream runs between any two steps, so memory that is shared without order shows.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from threading import RLock, local
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_current = local()  # the stream that each thread's work goes to
_inside = local()  # whether a thread is doing the work of a stream
_card = RLock()
POOL = 4  # 32 in fact
CPU = torch.device("cpu")


@dataclass(eq=False)
class Event:
    """Recorded at a place of a stream."""

    blocking: bool = False
    on_wait: Callable[[], None] = lambda: None
    stream: "Stream | None" = None
    place: int = 0

    def record(self) -> None:
        self.stream = _current.stream
        self.place = len(self.stream.work)

    def reach(self) -> None:
        if self.stream:
            self.stream.run_to(self.place)

    def synchronize(self) -> None:
        self.on_wait()
        self.reach()


@dataclass(eq=False)
class Stream:
    """Work in its order, and how much of it is done; `others` are the streams with which it is mixed."""

    others: "list[Stream]" = field(default_factory=list)
    work: list[Callable[[], object]] = field(default_factory=list)
    done: int = 0
    busy: bool = False

    def run_to(self, place: int) -> None:
        with _card:
            while self.done < place:
                self.step()
                for other in [each for each in self.others if each is not self]:
                    if not other.busy and other.done < len(other.work):
                        other.step()

    def step(self) -> None:
        self.done += 1
        self.busy = _inside.stream = True
        try:
            self.work[self.done - 1]()
        finally:
            self.busy = _inside.stream = False

    def wait_event(self, event: Event) -> None:
        if event.stream:  # nobody waits for an event that was never recorded
            self.work.append(partial(event.stream.run_to, event.place))

    def wait_stream(self, other: "Stream") -> None:
        self.work.append(partial(other.run_to, len(other.work)))

    def synchronize(self) -> None:
        self.run_to(len(self.work))


@dataclass(eq=False)
class CUDAGraph:
    """Repeats what was captured into it: a function of its fixed input, written into its fixed output."""

    repeat: Callable[[], None] = lambda: None

    def replay(self) -> None:
        _current.stream.work.append(self.repeat)


class Queued(TorchDispatchMode):
    """Copies between tensors go to the thread's stream; everything else is done at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and not getattr(_inside, "stream", False):
            _current.stream.work.append(lambda: args[0].copy_(args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


class SimulatedTorch:
    """`torch` as `service.backends.cuda` uses it, with one simulated card."""

    def __init__(self, on_wait: Callable[[], None] = lambda: None, *, mixed: bool = False) -> None:
        self._mixed = mixed
        self._default = Stream()
        self._streams: list[Stream] = []
        self._taken: Counter[int] = Counter()
        self._pools: dict[tuple[int, int], Stream] = {}
        self.repeat: Callable[[], None] = lambda: None
        self.order: list[str] = []
        self.broken = False
        self._C = SimpleNamespace(_cuda_clearCublasWorkspaces=lambda: self.order.append("clear"))
        self.cuda = SimpleNamespace(
            Stream=self._stream,
            Event=lambda *, blocking=False: Event(blocking, on_wait if blocking else lambda: None),
            CUDAGraph=CUDAGraph,
            stream=self._on,
            graph=self._capture,
            device=lambda _: nullcontext(),
            current_stream=lambda: self._default,
            is_bf16_supported=lambda including_emulation: not including_emulation,
            memory_reserved=lambda _: 7,
        )

    def _stream(self, priority: int = 0) -> Stream:
        """Each priority has POOL streams, which are handed out in turn."""
        key = priority, self._taken[priority] % POOL
        self._taken[priority] += 1
        if key not in self._pools:
            self._pools[key] = Stream(self._streams if self._mixed else [])
            self._streams.append(self._pools[key])
        return self._pools[key]

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before = getattr(_current, "stream", self._default)
        _current.stream = stream
        try:
            with Queued():  # type: ignore[no-untyped-call]
                yield
        finally:
            _current.stream = before

    @contextmanager
    def _capture(self, graph: CUDAGraph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # other threads go on serving meanwhile
        graph.repeat = self.repeat
        self.order.append("capture")
        try:
            with self._on(stream):
                yield
        finally:
            self._end_capture()

    def _end_capture(self) -> None:
        self.order.append("captured")
        if self.broken:
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")

    def current(self) -> Stream:
        """The stream that the calling thread's work goes to."""
        stream: Stream = _current.stream
        return stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: object) -> torch.device:
        return CPU

    def zeros(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        del pin_memory
        return torch.zeros(*args, **kwargs)

    def empty(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        """Filled, so that a read that is too early shows."""
        del pin_memory
        return torch.empty(*args, **kwargs).fill_(float("nan"))
