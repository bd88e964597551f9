import asyncio
import gc
import weakref

import pytest

from service.errors import ModelLoadFailed, ModelLoading, ModelNotFound, ModelPinned, WeightsUnavailable
from service.registry.registry import Registry
from service.registry.versions import Free
from service.store.store import StoredModel
from tests.service.registry.fakes import FakeSource


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def registry(source: FakeSource) -> Registry[str]:
    return Registry(source, source)


async def use(registry: Registry[str], name: str) -> str:
    async with registry.lease(name) as loaded:
        return loaded


async def begun(source: FakeSource, count: int = 1) -> None:
    async with asyncio.timeout(5):
        while len(source.loads) < count:  # noqa: ASYNC110  the tasks under test are what it gives its turn to
            await asyncio.sleep(0)


async def settled() -> None:
    """Whatever needs no more than turns of the event loop has happened."""
    for _ in range(20):
        await asyncio.sleep(0)


def state(registry: Registry[str], name: str) -> str:
    named = registry.named(name)
    return named.state if named else "available"


async def test_nothing_is_loaded_before_it_is_requested(source: FakeSource, registry: Registry[str]) -> None:
    assert registry.all() == []
    assert source.loads == []


async def test_a_model_is_loaded_once_for_all_who_wait(source: FakeSource, registry: Registry[str]) -> None:
    waiting = [asyncio.create_task(use(registry, name)) for name in ("a", "alpha", "a@1") * 10]
    await begun(source)
    assert [status.state for status in registry.all()] == ["loading"]

    source.gate.set()

    assert set(await asyncio.gather(*waiting)) == {"a@1"}
    assert source.loads == ["a@1"]
    assert {state(registry, name) for name in ("a", "alpha", "a@1")} == {"ready"}


async def test_a_ready_model_answers_while_another_is_loading(source: FakeSource, registry: Registry[str]) -> None:
    source.gate.set()
    await use(registry, "a")
    source.gate.clear()
    slow = asyncio.create_task(use(registry, "b"))
    await begun(source, 2)

    assert await use(registry, "a") == "a@1"
    assert not slow.done()

    source.gate.set()
    await slow


async def test_a_failed_load_is_an_answer_to_all_who_waited(source: FakeSource, registry: Registry[str]) -> None:
    source.broken.add("a@1")
    waiting = [asyncio.create_task(use(registry, "a")) for _ in range(3)]
    await begun(source)
    source.gate.set()

    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert [str(each) for each in results] == ["a@1 is broken"] * 3
    assert source.loads == ["a@1"]
    (status,) = registry.all()
    assert (status.state, str(status.failure)) == ("failed", "a@1 is broken")


async def test_a_failed_load_can_be_tried_again(source: FakeSource, registry: Registry[str]) -> None:
    source.gate.set()
    source.broken.add("a@1")
    with pytest.raises(ModelLoadFailed):
        await use(registry, "a")

    source.broken.clear()

    assert await use(registry, "a") == "a@1"


async def test_an_older_version_answers_where_the_newest_fails(source: FakeSource, registry: Registry[str]) -> None:
    source.versions["a"] = ["3", "2", "1"]
    source.broken |= {"a@3", "a@2"}
    source.gate.set()

    assert await use(registry, "a") == "a@1"
    assert await use(registry, "alpha") == "a@1"

    assert source.loads == ["a@3", "a@2", "a@1"]
    assert {status.stored.key: status.state for status in registry.all()} == {
        "a@3": "failed",
        "a@2": "failed",
        "a@1": "ready",
    }


async def test_a_version_that_is_requested_by_number_has_no_substitute(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.versions["a"] = ["2", "1"]
    source.broken.add("a@2")
    source.gate.set()

    with pytest.raises(ModelLoadFailed, match="a@2 is broken"):
        await use(registry, "a@2")


async def test_a_caller_that_goes_does_not_stop_the_load_for_the_others(
    source: FakeSource, registry: Registry[str]
) -> None:
    going, staying = (asyncio.create_task(use(registry, "a")) for _ in range(2))
    await begun(source)

    going.cancel()
    await asyncio.wait([going])
    source.gate.set()

    assert await staying == "a@1"


async def test_a_load_that_no_caller_waits_for_any_more_is_finished(
    source: FakeSource, registry: Registry[str]
) -> None:
    going = asyncio.create_task(use(registry, "a"))
    await begun(source)
    going.cancel()
    await asyncio.wait([going])

    source.gate.set()
    await settled()

    assert state(registry, "a") == "ready"
    assert registry.all()[0].leases == 0


async def test_a_lease_counts_for_as_long_as_it_lasts(source: FakeSource, registry: Registry[str]) -> None:
    source.gate.set()

    async with registry.lease("a"), registry.lease("alpha"):
        assert registry.all()[0].leases == 2

    assert registry.all()[0].leases == 0


async def test_an_unknown_model_is_the_stores_to_refuse(registry: Registry[str]) -> None:
    with pytest.raises(ModelNotFound):
        await use(registry, "c")


async def test_closing_gives_up_loads_under_way_and_forgets(source: FakeSource, registry: Registry[str]) -> None:
    waiting = asyncio.create_task(use(registry, "a"))
    await begun(source)

    await registry.close()

    assert isinstance(*await asyncio.gather(waiting, return_exceptions=True), asyncio.CancelledError)
    assert registry.loaded() == []


async def test_a_failure_keeps_nothing_of_those_who_waited_alive(source: FakeSource, registry: Registry[str]) -> None:
    class Body:
        """What a caller holds while it waits."""

    async def call() -> weakref.ref[Body]:
        body = Body()
        with pytest.raises(ModelLoadFailed):
            await use(registry, "a")
        return weakref.ref(body)

    source.gate.set()
    source.broken.add("a@1")
    reference = await call()
    gc.collect()

    assert reference() is None


async def test_a_caller_that_would_not_wait_learns_when_to_come_back(
    source: FakeSource, registry: Registry[str]
) -> None:
    with pytest.raises(ModelLoading, match=r"a is being loaded, which takes about 2\.0 s more") as refused:
        async with registry.lease("a", max_wait_seconds=0):
            pass
    assert refused.value.retry_after_seconds == pytest.approx(2.0, abs=0.1)

    source.gate.set()
    await settled()

    async with registry.lease("a", max_wait_seconds=0) as loaded:
        assert loaded == "a@1"


async def test_a_caller_that_would_not_wait_learns_what_failed_meanwhile(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.broken.add("a@1")
    with pytest.raises(ModelLoading):
        async with registry.lease("a", max_wait_seconds=0):
            pass
    source.gate.set()
    await settled()

    with pytest.raises(ModelLoadFailed, match="a@1 is broken"):
        async with registry.lease("a", max_wait_seconds=0):
            pass
    assert source.loads == ["a@1"]


async def test_callers_that_would_not_wait_reach_the_older_version_where_the_newest_fails(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.versions["a"] = ["2", "1"]
    source.broken.add("a@2")
    for _ in range(2):
        with pytest.raises(ModelLoading):
            async with registry.lease("a", max_wait_seconds=0):
                pass
        source.gate.set()
        await settled()
        source.gate.clear()

    async with registry.lease("a", max_wait_seconds=0) as loaded:
        assert loaded == "a@1"


async def test_another_name_of_a_ready_model_waits_for_nothing(source: FakeSource, registry: Registry[str]) -> None:
    source.gate.set()
    await use(registry, "a")

    async with registry.lease("alpha", max_wait_seconds=0) as loaded:
        assert loaded == "a@1"


async def test_unloading_waits_for_those_who_use_it(source: FakeSource, registry: Registry[str]) -> None:
    source.gate.set()
    async with registry.lease("a"):
        unloading = asyncio.create_task(registry.unload("a"))
        await settled()
        assert source.in_memory == ["a@1"]
    await unloading

    assert source.in_memory == []
    assert source.unloaded_for == ["unloaded"]
    assert registry.all() == []
    assert await use(registry, "a") == "a@1"


async def test_a_model_that_is_requested_while_it_is_being_unloaded_stays(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.gate.set()
    async with registry.lease("a"):
        unloading = asyncio.create_task(registry.unload("a"))
        await settled()
        assert await use(registry, "a") == "a@1"
        await unloading

    assert source.loads == ["a@1"]
    assert state(registry, "a") == "ready"


async def test_a_model_that_is_requested_while_it_is_being_freed_is_loaded_anew(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.gate.set()
    await use(registry, "a")
    source.closing.clear()
    unloading = asyncio.create_task(registry.unload("a"))
    await settled()

    assert await use(registry, "a") == "a@1"

    source.closing.set()
    await unloading
    assert source.loads == ["a@1", "a@1"]
    assert source.in_memory == ["a@1"]


async def test_unloading_a_model_means_all_its_versions_and_an_alias_only_its_own(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.versions["a"] = ["2", "1"]
    source.aliases["old"] = "a@1"
    source.gate.set()
    for name in ("a", "old"):
        await use(registry, name)

    await registry.unload("old")
    assert source.in_memory == ["a@2"]

    await use(registry, "old")
    await registry.unload("a")
    assert source.in_memory == []


async def test_unloading_what_failed_or_is_not_there_is_no_error(source: FakeSource, registry: Registry[str]) -> None:
    source.broken.add("a@1")
    source.gate.set()
    with pytest.raises(ModelLoadFailed):
        await use(registry, "a")

    await registry.unload("a")
    await registry.unload("b")


async def test_a_pinned_model_is_not_unloaded(source: FakeSource, registry: Registry[str]) -> None:
    source.gate.set()
    await registry.pin("alpha")

    with pytest.raises(ModelPinned, match="a@1 is pinned"):
        await registry.unload("a")

    registry.unpin("alpha")
    await registry.unload("a")
    assert source.in_memory == []


async def test_what_can_not_be_loaded_is_not_pinned(source: FakeSource, registry: Registry[str]) -> None:
    source.broken.add("a@1")
    source.gate.set()
    with pytest.raises(ModelLoadFailed):
        await registry.pin("a")
    source.broken.clear()

    await use(registry, "a")

    assert not registry.all()[0].pinned


async def test_a_pin_that_is_given_up_takes_no_other_along(source: FakeSource, registry: Registry[str]) -> None:
    first, second = (asyncio.create_task(registry.pin("a")) for _ in range(2))
    await begun(source)
    first.cancel()
    await asyncio.wait([first])
    source.gate.set()
    await second

    assert registry.all()[0].pinned
    registry.unpin("a")
    assert not registry.all()[0].pinned


async def test_an_unpin_ends_pins_that_are_still_under_way_too(source: FakeSource, registry: Registry[str]) -> None:
    pins = [asyncio.create_task(registry.pin("a")) for _ in range(2)]
    await begun(source)
    registry.unpin("a")
    source.gate.set()
    await asyncio.gather(*pins)

    assert not registry.all()[0].pinned
    await registry.pin("a")
    assert registry.all()[0].pinned


async def test_where_a_versions_weights_are_missing_the_version_before_it_serves() -> None:
    class Missing(FakeSource):
        async def load(self, stored: StoredModel, free: Free) -> str:
            if stored.version != "1":
                raise WeightsUnavailable(f"the weights of {stored.key} are not there")
            return await super().load(stored, free)

    source = Missing()
    source.versions = {"a": ["3", "2", "1"]}
    source.gate.set()
    registry = Registry(source, source)

    assert await use(registry, "a") == "a@1"
    with pytest.raises(WeightsUnavailable, match="of a@3"):
        await use(registry, "a@3")
    source.versions = {"a": ["3", "2"]}
    await registry.unload("a")
    with pytest.raises(WeightsUnavailable, match="of a@3"):
        await use(registry, "a")


async def test_a_pin_that_comes_while_an_unload_waits_keeps_its_model() -> None:
    class OneSlow(FakeSource):
        async def load(self, stored: StoredModel, free: Free) -> str:
            if stored.version == "2":
                return await super().load(stored, free)
            self.in_memory.append(stored.key)
            return stored.key

    source = OneSlow()
    source.versions = {"a": ["2", "1"]}
    registry = Registry(source, source)
    slow = asyncio.create_task(use(registry, "a@2"))
    await begun(source)
    assert await use(registry, "a@1") == "a@1"

    unloading = asyncio.create_task(registry.unload("a"))
    await settled()
    await registry.pin("a@1")
    source.gate.set()
    await asyncio.wait_for(unloading, 5)

    assert await slow == "a@2"
    assert source.in_memory == ["a@1"]
    assert state(registry, "a@1") == "ready"
