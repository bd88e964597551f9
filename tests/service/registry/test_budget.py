"""The registry within a byte budget. Time is the event loop's, and passes at once."""

import asyncio

import pytest

from service.errors import MemoryBudgetExceeded
from service.options import Budget
from service.registry.registry import Registry
from tests.service.registry.fakes import FakeSource, run_virtually
from tests.service.registry.test_registry import settled, use

MB = 1_000_000


def make(budget: Budget, **sizes: int) -> tuple[FakeSource, Registry[str]]:
    """Models of so many MB, loaded at once."""
    source = FakeSource()
    source.versions = {id_: ["1"] for id_ in sizes}
    source.sizes = {id_: size * MB for id_, size in sizes.items()}
    source.gate.set()
    return source, Registry(source, source, budget)


def test_the_least_recently_used_is_evicted_for_another() -> None:
    async def main() -> None:
        source, registry = make(Budget(10 * MB), a=4, b=4, c=4)
        for name in ("a", "b", "a", "c"):
            await use(registry, name)
            await asyncio.sleep(1)

        assert source.in_memory == ["a@1", "c@1"]
        assert source.unloaded_for == ["budget"]
        assert await use(registry, "b") == "b@1"  # and is loaded again when it is requested

    run_virtually(main())


def test_a_pinned_model_and_one_in_use_stay_whatever_comes() -> None:
    async def main() -> None:
        source, registry = make(Budget(10 * MB), a=4, b=4, c=4)
        await registry.pin("a")
        async with registry.lease("b"):
            with pytest.raises(MemoryBudgetExceeded) as refused:
                await use(registry, "c")
            assert source.in_memory == ["a@1", "b@1"]
        assert str(refused.value) == (
            "c@1 needs 4 MB, PVT_MEMORY_BUDGET_MB allows 10 MB and 8 MB are taken by what can't be evicted now "
            "(a@1 4 MB pinned, b@1 4 MB in use); ask again later, "
            "unpin or unload a model, or raise PVT_MEMORY_BUDGET_MB"
        )
        assert refused.value.retry_after_seconds is not None
        assert await use(registry, "c") == "c@1"
        assert source.in_memory == ["a@1", "c@1"]

    run_virtually(main())


def test_a_load_waits_for_a_model_that_is_in_use_for_a_moment() -> None:
    async def main() -> None:
        source, registry = make(Budget(10 * MB), a=6, b=6)
        async with registry.lease("a"):
            waiting = asyncio.create_task(use(registry, "b"))
            await asyncio.sleep(1)
            assert source.loads == ["a@1"]
        assert await waiting == "b@1"
        assert source.in_memory == ["b@1"]

    run_virtually(main())


def test_what_can_never_fit_is_refused_at_once_and_for_good() -> None:
    async def main() -> None:
        _, registry = make(Budget(10 * MB), a=4, large=11)
        await use(registry, "a")
        start = asyncio.get_running_loop().time()
        with pytest.raises(MemoryBudgetExceeded) as refused:
            await use(registry, "large")
        assert refused.value.retry_after_seconds is None
        assert str(refused.value).endswith("it never fits; raise PVT_MEMORY_BUDGET_MB")
        assert asyncio.get_running_loop().time() == start

    run_virtually(main())


def test_what_was_just_loaded_stays_for_its_time_however_many_others_are_requested() -> None:
    async def main() -> None:
        source, registry = make(Budget(10 * MB, min_residency_seconds=60), a=6, b=6)
        await use(registry, "a")
        with pytest.raises(MemoryBudgetExceeded, match="just loaded") as refused:
            await use(registry, "b")
        assert refused.value.retry_after_seconds == pytest.approx(60, abs=1)
        await asyncio.sleep(refused.value.retry_after_seconds or 0)
        assert await use(registry, "b") == "b@1"
        assert source.in_memory == ["b@1"]

    run_virtually(main())


def test_what_turns_out_larger_than_thought_evicts_others_afterwards() -> None:
    async def main() -> None:
        source, registry = make(Budget(10 * MB), a=4, b=9)
        source.guesses["b@1"] = 2 * MB
        async with registry.lease("a"):
            await use(registry, "b")
            await settled()
            assert source.in_memory == ["a@1"]  # what is in use stays, so the other one is evicted once it is not

        source.guesses.clear()
        assert await use(registry, "b") == "b@1"
        assert source.in_memory == ["b@1"]

    run_virtually(main())


def test_what_grows_while_it_is_used_counts() -> None:
    async def main() -> None:
        source, registry = make(Budget(10 * MB), a=4, b=4)
        for name in ("a", "b"):
            await use(registry, name)
        source.sizes["b"] = 8 * MB
        await use(registry, "b")
        await settled()
        assert source.in_memory == ["a@1"]  # the larger one gives more room for its two seconds of loading

    run_virtually(main())


def test_a_replaced_version_that_still_serves_takes_its_room() -> None:
    async def main() -> None:
        source, registry = make(Budget(10 * MB), a=4, b=4)
        async with registry.lease("a"):
            source.versions["a"] = ["2", "1"]
            await registry.refresh()
            assert sorted(source.in_memory) == ["a@1", "a@2"]
            with pytest.raises(MemoryBudgetExceeded, match="a@1 4 MB in use"):
                async with registry.lease("a"):
                    await use(registry, "b")
        assert await use(registry, "b") == "b@1"

    run_virtually(main())


def test_without_a_budget_everything_stays() -> None:
    async def main() -> None:
        source, registry = make(Budget(), a=4000, b=4000)
        for name in ("a", "b"):
            await use(registry, name)
        assert source.in_memory == ["a@1", "b@1"]

    run_virtually(main())


def test_idle_models_are_evicted_for_what_a_load_takes_while_it_runs_although_no_budget_is_set() -> None:
    async def main() -> None:
        source, registry = make(Budget(None), a=4, b=4, c=4)
        await use(registry, "a")
        await asyncio.sleep(1)
        await use(registry, "b")
        await asyncio.sleep(1)
        source.missing = lambda key: max(0, len(source.in_memory) - 1) * MB if key == "c@1" else 0

        assert await use(registry, "c") == "c@1"
        assert source.in_memory == ["b@1", "c@1"]

    run_virtually(main())


def test_a_load_that_misses_memory_which_nothing_frees_gives_up_after_the_wait() -> None:
    async def main() -> None:
        source, registry = make(Budget(None, max_wait_seconds=5), a=4, c=4)
        source.missing = lambda key: MB if key == "c@1" else 0
        async with registry.lease("a"):
            before = asyncio.get_running_loop().time()
            await use(registry, "c")  # the fake loads all the same

            assert 4.9 < asyncio.get_running_loop().time() - before < 5.5

    run_virtually(main())
