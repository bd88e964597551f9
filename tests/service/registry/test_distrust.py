"""A loaded model whose answers are wrong: it is loaded anew, once."""

import asyncio

import pytest

from service.errors import AnswersWrong
from service.options import Budget
from service.registry.registry import WRONG_AGAIN_SECONDS, Registry
from tests.service.registry.fakes import FakeSource, run_virtually
from tests.service.registry.test_registry import begun, settled, use


@pytest.fixture
async def source() -> FakeSource:
    source = FakeSource()
    source.gate.set()
    return source


async def test_it_is_loaded_anew_and_requests_wait_for_that(source: FakeSource) -> None:
    registry = Registry[str](source, source)
    await registry.pin("a")
    await use(registry, "alpha")
    (before,) = registry.loaded()
    source.gate.clear()

    registry.distrust(before, "logits are off")
    await begun(source, 2)

    assert registry.loaded() == []
    assert registry.distrusted("a") == registry.distrusted("alpha") == "logits are off"
    assert source.unloaded_for == ["wrong"]
    source.gate.set()
    assert await use(registry, "a") == "a@1"
    assert registry.distrusted("a") == ""
    assert [each.pinned for each in registry.all()] == [True]
    assert source.in_memory == ["a@1"]


async def test_those_who_use_it_end_before_its_memory_is_freed(source: FakeSource) -> None:
    source.sizes = {"a@1": 1}
    registry = Registry[str](source, source, Budget(bytes=1))
    async with registry.lease("a") as used:
        registry.distrust(used, "logits are off")
        await settled()
        assert source.in_memory == ["a@1"]  # the budget holds one at a time
    await settled()

    assert await use(registry, "a") == "a@1"
    assert source.loads == ["a@1", "a@1"]


async def test_the_second_time_it_fails_until_it_is_unloaded_or_its_files_change(source: FakeSource) -> None:
    registry = Registry[str](source, source)
    for _ in range(2):
        await use(registry, "a")
        registry.distrust(registry.loaded()[0], "logits are off")
    await settled()

    assert source.in_memory == []
    for _ in range(2):
        with pytest.raises(AnswersWrong, match="a@1 was loaded anew, and is wrong again: logits are off"):
            await use(registry, "a")
    assert [each.state for each in registry.all()] == ["failed"]
    assert len(source.loads) == 2
    await registry.unload("a")
    assert await use(registry, "a") == "a@1"
    registry.distrust(registry.loaded()[0], "logits are off")
    source.marks["a@1"] = 1
    assert await use(registry, "a") == "a@1"


async def test_the_next_best_version_answers_in_place_of_one_that_failed(source: FakeSource) -> None:
    source.versions["a"] = ["2", "1"]
    registry = Registry[str](source, source)
    for _ in range(2):
        await use(registry, "a")
        registry.distrust(registry.loaded()[0], "logits are off")

    assert await use(registry, "a") == "a@1"


def test_what_happens_long_after_is_the_first_time_again() -> None:
    async def twice() -> str:
        source = FakeSource()
        source.gate.set()
        registry = Registry[str](source, source)
        for _ in range(3):
            await use(registry, "a")
            registry.distrust(registry.loaded()[0], "logits are off")
            await asyncio.sleep(WRONG_AGAIN_SECONDS + 1)
        return await use(registry, "a")

    assert run_virtually(twice()) == "a@1"


async def test_what_has_left_memory_meanwhile_is_not_loaded_for_it(source: FakeSource) -> None:
    registry = Registry[str](source, source)
    await use(registry, "a")
    await registry.unload("a")

    registry.distrust("a@1", "logits are off")
    with registry.held("a@1") as held:
        assert not held
    await settled()

    assert source.loads == ["a@1"]
