"""Whatever happens in whatever order: what is in use stays, the budget holds, and everybody gets an answer."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.errors import ServiceError
from service.options import Budget
from service.registry.registry import Registry
from tests.service.registry.fakes import FakeSource, VirtualLoop

BUDGET = Budget(bytes=10, min_residency_seconds=3, max_wait_seconds=5)
SIZES = {"a": 3, "b": 4, "c": 5, "d": 8, "e": 11}
NAMES = st.sampled_from([*SIZES, "alpha", "a@1"])


class RegistryMachine(RuleBasedStateMachine):
    """Callers that come and go, loads that succeed and fail, versions and aliases that change."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.source = FakeSource()
        self.source.versions = {id_: ["1"] for id_ in SIZES}
        self.source.sizes = SIZES
        self.registry = Registry(self.source, self.source, BUDGET)
        self.holding: list[tuple[str, AbstractAsyncContextManager[str]]] = []
        self.waiting: dict[asyncio.Task[None], None] = {}
        self.managing: dict[asyncio.Task[None], None] = {}
        self.unexpected: list[BaseException] = []
        self.leases: dict[str, int] = {}

    def run(self, work: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        async def main() -> None:
            if work:
                await work()
            for _ in range(30):
                await asyncio.sleep(0)
            self.leases = {
                status.stored.key: status.leases for status in self.registry.all() if status.state == "ready"
            }

        self.loop.run_until_complete(main())

    def begin(self, kind: dict[asyncio.Task[None], None], work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except ServiceError:
                pass
            except Exception as error:  # noqa: BLE001  the invariant shows it
                self.unexpected.append(error)

        async def start() -> None:
            task = asyncio.create_task(guarded())
            kind[task] = None
            task.add_done_callback(kind.pop)

        self.run(start)

    @rule(name=NAMES, max_wait_seconds=st.sampled_from([None, None, 0.0, 1.0]))
    def ask(self, name: str, max_wait_seconds: float | None) -> None:
        async def work() -> None:
            lease = self.registry.lease(name, max_wait_seconds)
            self.holding.append((await lease.__aenter__(), lease))

        self.begin(self.waiting, work())

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        _, lease = self.holding.pop(data.draw(st.integers(0, len(self.holding) - 1)))

        async def work() -> None:
            await lease.__aexit__(None, None, None)

        self.run(work)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        task = list(self.waiting)[data.draw(st.integers(0, len(self.waiting) - 1))]
        task.cancel()
        self.run()

    @rule()
    def finish_loads(self) -> None:
        self.source.gate.set()
        self.run()
        self.source.gate.clear()

    @rule(name=NAMES, what=st.sampled_from(["unload", "pin"]))
    def manage(self, name: str, what: str) -> None:
        self.begin(self.managing, getattr(self.registry, what)(name))

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        async def work() -> None:
            self.registry.unpin(name)

        self.run(work)

    @rule(again=st.booleans())
    def refresh(self, again: bool) -> None:
        self.begin(self.managing, self.registry.refresh(again=again))

    @rule(id_=st.sampled_from([*SIZES]), broken=st.booleans())
    def publish(self, id_: str, broken: bool) -> None:
        version = str(int(self.source.versions[id_][0]) + 1)
        self.source.versions[id_] = [version, *self.source.versions[id_][:2]]
        if broken:
            self.source.broken.add(f"{id_}@{version}")

    @rule(id_=st.sampled_from([*SIZES]))
    def move_alias(self, id_: str) -> None:
        self.source.aliases["alpha"] = id_

    @rule(gone=st.booleans())
    def vanish(self, gone: bool) -> None:
        self.source.gone = gone

    @rule(key=st.sampled_from([f"{id_}@{version}" for id_ in SIZES for version in "123"]))
    def mend_or_break(self, key: str) -> None:
        self.source.broken ^= {key}
        self.source.marks[key] = self.source.marks.get(key, 0) + 1

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0]))
    def pass_time(self, seconds: float) -> None:
        async def work() -> None:
            await asyncio.sleep(seconds)

        self.run(work)

    @invariant()
    def what_is_in_use_is_in_memory(self) -> None:
        assert {loaded for loaded, _ in self.holding} <= {*self.source.in_memory}

    @invariant()
    def the_budget_holds(self) -> None:
        assert sum(SIZES[key.partition("@")[0]] for key in self.source.in_memory) <= 10

    @invariant()
    def nothing_is_twice_in_memory(self) -> None:
        assert len(self.source.in_memory) == len({*self.source.in_memory})

    @invariant()
    def leases_are_those_of_who_holds_or_waits(self) -> None:
        if not self.waiting and not self.managing:
            held = [key for key, _ in self.holding]
            assert {key: leases for key, leases in self.leases.items() if leases} == {k: held.count(k) for k in held}

    @invariant()
    def nothing_unforeseen_happened(self) -> None:
        assert self.unexpected == []

    def teardown(self) -> None:
        """Once all who hold a model have gone and loads go on, everybody has got an answer."""
        self.source.gate.set()

        async def work() -> None:
            for _, lease in self.holding:
                await lease.__aexit__(None, None, None)
            self.holding.clear()
            async with asyncio.timeout(1000):
                while self.waiting or self.managing:
                    await asyncio.sleep(1)
                    for _, lease in self.holding:
                        await lease.__aexit__(None, None, None)
                    self.holding.clear()
            await self.registry.close()

        self.loop.run_until_complete(work())
        self.loop.close()
        assert self.unexpected == []


RegistryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRegistry = RegistryMachine.TestCase
