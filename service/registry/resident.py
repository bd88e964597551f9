"""A model in memory: at its own input size, at others, and with stage maps once a request needs them."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Protocol, TypeVar

from service.errors import InvalidRequest, QueueFull
from service.execution.executable import Executable
from service.execution.tuning import Reserve
from service.pipeline import Pipeline, Sized
from service.results import Size
from service.sharing import cancel, shared

STRIDE = 32  # of the last stage: sides are multiples of it, so that every stage map fits
T = TypeVar("T")


class Compile(Protocol):
    """What `make` compiles for a model, on the thread for loads.

    The first graph computes so many `pixels` at a time; for more, `make` reserves memory. Raises MemoryExhausted,
    ModelLoadFailed or WeightsUnavailable.
    """

    def __call__(  # noqa: D102
        self, resident: "Resident", make: Callable[[Reserve], T], pixels: int
    ) -> Coroutine[None, None, T]: ...


@dataclass(eq=False, slots=True)
class _Other:
    """An input size that is not the model's own, compiled or being compiled, and how many requests use it."""

    task: "asyncio.Task[Sized]"
    users: int = 0


class Resident:
    """A loaded model; close it when no request uses it. Its methods belong to one event loop."""

    def __init__(self, executable: Executable, pipeline: Pipeline, compile_: Compile, *, max_others: int) -> None:
        """`max_others`: how many input sizes besides the model's own are kept compiled."""
        self.executable = executable
        self._pipeline = pipeline
        self._compile = compile_
        self._max_others = max_others
        self._own = pipeline.open(executable)
        # Mutable state: the other sizes, least recently used first; evicted sizes whose lanes are still open; and the
        # tasks that make graphs with stage maps.
        self._others: OrderedDict[Size, _Other] = OrderedDict()
        self._evicted: list[Sized] = []
        self._staging: dict[Executable, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<Resident {self.executable.stored.id} others={list(self._others)}>"

    @property
    def memory_bytes(self) -> int:
        """Measured memory of the model and of all graphs that were added since the load."""
        return self.executable.report.memory_bytes + sum(each.executable.added_bytes for each in self._compiled())

    @property
    def notes(self) -> list[str]:
        """What was tried and left out, and why, at any of its sizes."""
        return [note for each in self._compiled() for note in each.executable.notes]

    def at(self, size: Size | None = None, *, stages: bool = False) -> AbstractAsyncContextManager[Sized]:
        """The model at `size`, its own by default, for as long as the context lasts.

        It is compiled first if need be, which goes on if a caller is cancelled.

        Raises:
            InvalidRequest: the model can't take that size.
            QueueFull: all other sizes that may be kept are in use.
            ModelLoadFailed: the model's files have changed since it was loaded, or can't be compiled for that.
        """
        own = size is None or size == (self.executable.height, self.executable.width)
        if own and (not stages or self.executable.staged):
            return nullcontext(self._own)
        return self._compiled_at(None if own else size, stages=stages)

    @asynccontextmanager
    async def _compiled_at(self, size: Size | None, *, stages: bool) -> AsyncIterator[Sized]:
        if size is None:
            await self._stage(self._own, stages=stages)
            yield self._own
            return
        other = self._other(size)
        other.users += 1
        try:
            sized = await shared(other.task)
            await self._stage(sized, stages=stages)
            yield sized
        finally:
            other.users -= 1

    def replan(self) -> None:
        """Give the scheduler the executable's batch plan, which has changed."""
        self._pipeline.scheduler.replan(self._own.lane, self.executable.plan)

    def wrong(self, turn: int, instance: int) -> str | None:
        """What `Executable.wrong` finds at one of its input sizes, by `turn`. Blocking."""
        compiled = self._compiled()
        return compiled[turn % len(compiled)].executable.wrong(instance, turn // len(compiled))

    async def close(self) -> None:
        """Close the model's lanes in the scheduler and cancel what is being compiled."""
        self._evicted += self._compiled()
        await cancel([*self._staging.values(), *(other.task for other in self._others.values())])
        await self._close_evicted()
        self._others.clear()

    def _compiled(self) -> list[Sized]:
        """The model at its own size, and at the others that are compiled."""
        tasks = [other.task for other in self._others.values()]
        return [self._own, *(task.result() for task in tasks if task.done() and not _failed(task))]

    def _other(self, size: Size) -> _Other:
        other = self._others.get(size)
        if other is None or _failed(other.task):
            if any(side % STRIDE or side < STRIDE for side in size):
                raise InvalidRequest(
                    f"size {size[0]}x{size[1]}: each side must be a multiple of {STRIDE}, up to PVT_MAX_INPUT_SIDE"
                )
            self._others.pop(size, None)  # it failed
            self._make_room()
            other = self._others[size] = _Other(asyncio.create_task(self._resize(size)))
            other.task.add_done_callback(_failed)  # retrieves it, if no caller is left
        self._others.move_to_end(size)
        return other

    def _make_room(self) -> None:
        while len(self._others) >= self._max_others:
            idle = next((each for each, other in self._others.items() if not other.users and other.task.done()), None)
            if idle is None:
                sizes = ", ".join(f"{height}x{width}" for height, width in self._others)
                raise QueueFull(
                    f"{self.executable.stored.id} is in use at {sizes}, and PVT_SIZES_PER_MODEL allows "
                    f"{self._max_others} sizes besides its own",
                    retry_after_seconds=1.0,
                )
            task = self._others.pop(idle).task
            self._evicted += [] if _failed(task) else [task.result()]

    async def _close_evicted(self) -> None:
        while self._evicted:
            await self._pipeline.close(self._evicted.pop())

    async def _resize(self, size: Size) -> Sized:
        await self._close_evicted()
        make = partial(self.executable.resized, *size)
        return self._pipeline.open(await self._compile(self, make, self.executable.plan.sizes[0] * prod(size)))

    async def _stage(self, sized: Sized, *, stages: bool) -> None:
        executable = sized.executable
        if not stages or executable.staged:
            return
        task = self._staging.get(executable)
        if task is None:
            pixels = executable.plan.sizes[0] * executable.height * executable.width
            task = self._staging[executable] = asyncio.create_task(self._compile(self, executable.add_stages, pixels))
            task.add_done_callback(lambda done: (self._staging.pop(executable), _failed(done)))
        await shared(task)


def _failed(task: asyncio.Task[T]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
