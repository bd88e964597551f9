import asyncio
import gc
import weakref
from pathlib import Path

import pytest

from service.errors import ModelLoadFailed, ModelNotFound
from service.registry import Registry
from service.store import StoredModel


class FakeStore:
    """Knows `a` and `b`, and `a` by the nickname `alpha`; each load waits for the gate."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.loads: list[str] = []
        self.broken: set[str] = set()

    async def find(self, name: str) -> StoredModel:
        await asyncio.sleep(0)
        ids = {"a": "a", "b": "b", "alpha": "a"}
        if name not in ids:
            raise ModelNotFound(name)
        return StoredModel(ids[name], "1", Path(), None)

    async def load(self, stored: StoredModel) -> str:
        self.loads.append(stored.id)
        await self.gate.wait()
        if stored.id in self.broken:
            raise ModelLoadFailed(f"{stored.id} is broken")
        return f"loaded {stored.id}"


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def registry(store: FakeStore) -> Registry[str]:
    return Registry(store.find, store.load)


async def use(registry: Registry[str], name: str) -> str:
    async with registry.lease(name) as loaded:
        return loaded


async def begun(store: FakeStore, count: int = 1) -> None:
    async with asyncio.timeout(5):
        while len(store.loads) < count:  # noqa: ASYNC110  the tasks under test are what it gives its turn to
            await asyncio.sleep(0)


async def test_nothing_is_loaded_before_it_is_asked_for(store: FakeStore, registry: Registry[str]) -> None:
    assert registry.status("a").state == "available"
    assert store.loads == []


async def test_a_model_is_loaded_once_for_all_who_wait(store: FakeStore, registry: Registry[str]) -> None:
    waiting = [asyncio.create_task(use(registry, name)) for name in ("a", "alpha") * 10]
    await begun(store)
    assert registry.status("a").state == "loading"

    store.gate.set()

    assert set(await asyncio.gather(*waiting)) == {"loaded a"}
    assert store.loads == ["a"]
    assert registry.status("a").state == "ready"


async def test_a_ready_model_answers_while_another_is_loading(store: FakeStore, registry: Registry[str]) -> None:
    store.gate.set()
    await use(registry, "a")
    store.gate.clear()
    slow = asyncio.create_task(use(registry, "b"))
    await begun(store, 2)

    assert await use(registry, "a") == "loaded a"
    assert not slow.done()

    store.gate.set()
    await slow


async def test_a_failed_load_is_an_answer_to_all_who_waited(store: FakeStore, registry: Registry[str]) -> None:
    store.broken.add("a")
    waiting = [asyncio.create_task(use(registry, "a")) for _ in range(3)]
    await begun(store)
    store.gate.set()

    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert [str(each) for each in results] == ["a is broken"] * 3
    assert store.loads == ["a"]
    status = registry.status("a")
    assert (status.state, str(status.failure)) == ("failed", "a is broken")


async def test_a_failed_load_can_be_tried_again(store: FakeStore, registry: Registry[str]) -> None:
    store.gate.set()
    store.broken.add("a")
    with pytest.raises(ModelLoadFailed):
        await use(registry, "a")

    store.broken.clear()

    assert await use(registry, "a") == "loaded a"


async def test_a_caller_that_goes_leaves_the_load_to_the_others(store: FakeStore, registry: Registry[str]) -> None:
    going, staying = (asyncio.create_task(use(registry, "a")) for _ in range(2))
    await begun(store)

    going.cancel()
    await asyncio.wait([going])
    store.gate.set()

    assert await staying == "loaded a"


async def test_a_lease_counts_for_as_long_as_it_lasts(store: FakeStore, registry: Registry[str]) -> None:
    store.gate.set()

    async with registry.lease("a"), registry.lease("alpha"):
        assert registry.status("a").leases == 2

    assert registry.status("a").leases == 0


async def test_an_unknown_model_is_the_stores_to_refuse(registry: Registry[str]) -> None:
    with pytest.raises(ModelNotFound):
        await use(registry, "c")


async def test_closing_gives_up_loads_under_way_and_forgets(store: FakeStore, registry: Registry[str]) -> None:
    waiting = asyncio.create_task(use(registry, "a"))
    await begun(store)

    await registry.close()

    assert isinstance(*await asyncio.gather(waiting, return_exceptions=True), asyncio.CancelledError)
    assert registry.loaded() == []


async def test_a_failure_keeps_nothing_of_those_who_waited_alive(store: FakeStore, registry: Registry[str]) -> None:
    class Body:
        """What a caller holds while it waits."""

    async def call() -> weakref.ref[Body]:
        body = Body()
        with pytest.raises(ModelLoadFailed):
            await use(registry, "a")
        return weakref.ref(body)

    store.gate.set()
    store.broken.add("a")
    reference = await call()
    gc.collect()

    assert reference() is None
