"""New versions and changed aliases, while the old ones serve."""

import asyncio

import pytest

from service.errors import ModelLoadFailed
from service.options import Budget
from service.registry.registry import Registry
from tests.service.registry.fakes import FakeSource
from tests.service.registry.test_registry import begun, settled, state, use


@pytest.fixture
async def source() -> FakeSource:
    """`a` in version 1; what is loaded is ready at once."""
    source = FakeSource()
    source.gate.set()
    return source


@pytest.fixture
async def registry(source: FakeSource) -> Registry[str]:
    """Has loaded `a` in version 1, by two names."""
    registry = Registry(source, source)
    for name in ("a", "alpha"):
        await use(registry, name)
    return registry


async def test_while_a_new_version_is_loaded_the_old_one_answers_and_nobody_waits(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.versions["a"] = ["2", "1"]
    source.gate.clear()
    refreshing = asyncio.create_task(registry.refresh())
    await begun(source, 2)

    async with registry.lease("a", max_wait_seconds=0) as before:
        source.gate.set()
        await refreshing
        async with registry.lease("a", max_wait_seconds=0) as after:
            assert (before, after) == ("a@1", "a@2")
        await settled()
        assert sorted(source.in_memory) == ["a@1", "a@2"]  # it is still used
    await settled()

    assert source.in_memory == ["a@2"]
    assert source.unloaded_for == ["replaced"]
    assert await use(registry, "alpha") == "a@2"
    assert source.loads == ["a@1", "a@2"]


async def test_a_new_version_that_fails_leaves_the_old_one_serving_and_is_not_tried_all_the_time(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.versions["a"] = ["2", "1"]
    source.broken.add("a@2")
    for _ in range(3):
        await registry.refresh()

    assert await use(registry, "a") == "a@1"
    assert source.loads == ["a@1", "a@2"]
    assert {status.stored.key: str(status.failure) for status in registry.all() if status.failure} == {
        "a@2": "a@2 is broken"
    }


@pytest.mark.parametrize("again", [False, True])
async def test_a_version_that_failed_is_tried_again_when_its_files_change_or_it_is_asked_for(
    source: FakeSource, registry: Registry[str], again: bool
) -> None:
    source.versions["a"] = ["2", "1"]
    source.broken.add("a@2")
    await registry.refresh()
    source.broken.clear()

    if not again:
        source.marks["a@2"] = 1
    await registry.refresh(again=again)

    assert await use(registry, "a") == "a@2"
    assert [status.state for status in registry.all()] == ["ready"]


async def test_of_several_new_versions_the_newest_that_can_be_loaded_serves(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.versions["a"] = ["3", "2", "1"]
    source.broken.add("a@3")
    await registry.refresh()

    assert await use(registry, "a") == "a@2"


async def test_a_changed_alias_takes_its_callers_along_and_nobody_else(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.aliases["alpha"] = "b"
    await registry.refresh()

    assert await use(registry, "alpha") == "b@1"
    assert await use(registry, "a") == "a@1"
    assert sorted(source.in_memory) == ["a@1", "b@1"]


async def test_an_alias_that_changes_during_its_first_load_is_followed(source: FakeSource) -> None:
    source.gate.clear()
    registry = Registry(source, source)
    waiting = asyncio.create_task(use(registry, "alpha"))
    await begun(source)
    source.aliases["alpha"] = "b"
    refreshing = asyncio.create_task(registry.refresh())
    await begun(source, 2)
    source.gate.set()
    await refreshing

    assert await waiting == "a@1"
    assert await use(registry, "alpha") == "b@1"


async def test_a_version_that_is_taken_away_gives_its_place_back_to_the_one_before(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.versions["a"] = ["2", "1"]
    await registry.refresh()
    source.versions["a"] = ["1"]
    await registry.refresh()

    await settled()

    assert await use(registry, "a") == "a@1"
    assert source.in_memory == ["a@1"]


async def test_a_name_that_is_taken_away_stands_for_nothing_any_more(
    source: FakeSource, registry: Registry[str]
) -> None:
    del source.aliases["alpha"]
    await registry.refresh()

    assert registry.named("alpha") is None
    assert state(registry, "a") == "ready"


@pytest.mark.parametrize("how", ["unreadable", "empty"])
async def test_a_store_that_vanishes_leaves_everything_serving(
    source: FakeSource, registry: Registry[str], how: str
) -> None:
    if how == "empty":  # as a mount point is without its mount
        source.versions.clear()
        source.aliases.clear()
    source.gone = how == "unreadable"
    for _ in range(3):
        await registry.refresh()

    assert [await use(registry, name) for name in ("a", "alpha")] == ["a@1", "a@1"]


async def test_a_model_that_was_unloaded_meanwhile_does_not_come_back(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.versions["a"] = ["2", "1"]
    source.gate.clear()
    refreshing = asyncio.create_task(registry.refresh())
    await begun(source, 2)
    unloading = asyncio.create_task(registry.unload("a"))
    await settled()
    source.gate.set()
    await asyncio.gather(refreshing, unloading)
    await settled()

    assert source.in_memory == []


async def test_a_new_version_without_room_beside_the_old_one_leaves_that_serving(source: FakeSource) -> None:
    registry = Registry(source, source, Budget(bytes=3_000_000, max_wait_seconds=0))
    source.sizes["a"] = 2_000_000
    await use(registry, "a")
    source.versions["a"] = ["2", "1"]

    await registry.refresh()

    assert await use(registry, "a") == "a@1"
    failures = [str(status.failure) for status in registry.all() if status.failure]
    assert len(failures) == 1
    assert failures[0].startswith("a@2 needs 2 MB, PVT_MEMORY_BUDGET_MB allows 3 MB and 2 MB are taken")
    assert "(a@1 2 MB in use)" in failures[0]


async def test_a_pin_stays_with_the_name(source: FakeSource, registry: Registry[str]) -> None:
    await registry.pin("a")
    source.versions["a"] = ["2", "1"]
    await registry.refresh()

    assert {status.stored.key: status.pinned for status in registry.all()} == {"a@2": True}


async def test_a_request_that_finds_the_newest_version_broken_does_not_try_it_again_while_an_older_one_serves(
    source: FakeSource, registry: Registry[str]
) -> None:
    source.versions["a"] = ["2", "1"]
    source.broken.add("a@2")
    with pytest.raises(ModelLoadFailed):
        await use(registry, "a@2")

    await registry.refresh()

    assert source.loads == ["a@1", "a@2"]
