"""A finder and loader of models that are strings, and an event loop whose time passes at once."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from service.errors import ModelLoadFailed, ModelNotFound, WeightsUnavailable
from service.registry.residency import Footprint
from service.registry.versions import Candidate, Free, UnloadReason
from service.store.store import StoredModel

T = TypeVar("T")


class FakeSource:
    """Each load waits for its gate, or for the common one; `versions` are newest first."""

    def __init__(self) -> None:
        self.versions: dict[str, list[str]] = {"a": ["1"], "b": ["1"]}
        self.aliases: dict[str, str] = {"alpha": "a"}
        self.sizes: dict[str, int] = {}
        self.guesses: dict[str, int] = {}
        self.broken: set[str] = set()
        self.missing: Callable[[str], int] = lambda _: 0
        self.marks: dict[str, int] = {}
        self.gone = False
        self.gate = asyncio.Event()
        self.closing = asyncio.Event()
        self.closing.set()
        self.loads: list[str] = []
        self.in_memory: list[str] = []
        self.unloaded_for: list[UnloadReason] = []

    async def find(self, name: str) -> Sequence[Candidate]:
        await asyncio.sleep(0)
        if self.gone:
            raise WeightsUnavailable("the store can't be read")
        id_, _, version = self.aliases.get(name, name).partition("@")
        wanted = [each for each in self.versions.get(id_, []) if version in {"", each}]
        if not wanted:
            raise ModelNotFound(name)
        return [self.candidate(id_, each) for each in wanted]

    async def obtain(self, name: str, max_wait_seconds: float | None) -> Sequence[Candidate]:  # noqa: ARG002
        return await self.find(name)

    def candidate(self, id_: str, version: str) -> Candidate:
        stored = StoredModel(id_, version, Path(), None)
        return Candidate(stored, stored.key, self.marks.get(stored.key, 0))

    async def load(self, stored: StoredModel, free: Free) -> str:
        await free(lambda: self.missing(stored.key))
        self.loads.append(stored.key)
        await self.gate.wait()
        if stored.key in self.broken:
            raise ModelLoadFailed(f"{stored.key} is broken")
        self.in_memory.append(stored.key)
        return stored.key

    async def unload(self, only: list[str], reason: UnloadReason) -> None:
        self.unloaded_for.append(reason)
        await self.closing.wait()
        self.in_memory.remove(only.pop())

    def memory_bytes(self, loaded: str) -> int:
        return self.sizes.get(loaded, self.sizes.get(loaded.partition("@")[0], 1))

    def footprint(self, stored: StoredModel) -> Footprint:
        return Footprint(bytes=self.guesses.get(stored.key, self.memory_bytes(stored.key)), seconds=2.0)


class _NoWaiting(selectors.SelectSelector):
    """Moves `now` on instead of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            return super().select(5)  # nothing is going to happen: a thread may be on its way
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on which sleeping takes no time."""

    def __init__(self) -> None:
        self._selector_of_ours = _NoWaiting()
        super().__init__(self._selector_of_ours)

    def time(self) -> float:
        return self._selector_of_ours.now


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """What `main` gives, on a VirtualLoop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
