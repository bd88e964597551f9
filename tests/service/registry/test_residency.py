"""The pure decision: what is evicted."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from service.registry.residency import Evict, Full, MemoryUse, credit, make_room, used_bytes

NOW = 100.0


def held(
    key: str, size: int, *, seconds: float = 1.0, used: float = 0.0, evictable_at: float = 0.0, kept_by: str = ""
) -> MemoryUse:
    return MemoryUse(key, key, size, credit(0.0, seconds, size), used, evictable_at, kept_by)  # type: ignore[arg-type]


def test_nothing_is_evicted_while_there_is_room() -> None:
    assert make_room([held("a", 5), held("b", 4)], 1, 10, NOW) == Evict((), 0.0)


def test_of_equals_the_one_that_was_used_longest_ago_is_evicted() -> None:
    models = [held("a", 5, used=2), held("b", 5, used=1)]

    assert make_room(models, 1, 10, NOW) == Evict(("b",), 0.2)


def test_what_frees_most_bytes_for_a_second_of_loading_is_evicted_first() -> None:
    models = [held("slow", 4, seconds=20, used=1), held("quick", 4, seconds=2, used=2), held("small", 2, used=3)]

    assert make_room(models, 1, 10, NOW) == Evict(("quick",), 0.5)


def test_an_eviction_raises_the_credit_of_what_is_used_from_then_on() -> None:
    """So that even what is slow to load is evicted once it has not been used for long."""
    old = MemoryUse("slow but old", "slow but old", 5, credit(0.0, 30, 5), 0.0, 0.0)
    inflation = 0.0
    for turn in range(20):
        young = MemoryUse(f"quick {turn}", "quick", 5, credit(inflation, 5, 5), 1.0 + turn, 0.0)
        decision = make_room([old, young], 5, 10, NOW, inflation)
        assert isinstance(decision, Evict)
        inflation = decision.inflation
        if decision.keys == (old.key,):
            break
    assert turn == 5


def test_what_need_not_be_evicted_stays() -> None:
    models = [held("small", 1, seconds=0.1), held("large", 8, seconds=8)]

    assert make_room(models, 7, 10, NOW) == Evict(("large",), 1.0)


def test_what_is_held_is_never_evicted() -> None:
    kept = ("pinned", "in use", "loading", "unloading")
    models = [held(kept_by, 2, kept_by=kept_by) for kept_by in kept]

    assert make_room(models, 3, 10, NOW) == Full(NOW)
    assert make_room(models, 9, 10, NOW) == Full(inf)


def test_what_was_just_loaded_stays_for_a_while() -> None:
    models = [held("young", 5, evictable_at=NOW + 3), held("younger", 5, evictable_at=NOW + 4)]

    assert make_room(models, 1, 10, NOW) == Full(NOW + 3)
    assert make_room(models, 6, 10, NOW) == Full(NOW + 4)
    assert make_room(models, 6, 10, NOW + 4) == Evict(("young", "younger"), 0.2)


MODELS = st.lists(
    st.builds(
        MemoryUse,
        key=st.uuids().map(str),
        name=st.just(""),
        bytes=st.integers(1, 20),
        credit=st.floats(0, 10),
        used_at=st.floats(0, NOW),
        evictable_at=st.sampled_from([0.0, NOW - 1, NOW + 1, NOW + 5]),
        kept_by=st.sampled_from(["", "", "", "pinned", "in use", "loading", "unloading"]),
    ),
    max_size=8,
    unique_by=lambda each: each.key,
)


@given(models=MODELS, needed=st.integers(0, 40), budget=st.integers(0, 80))
def test_it_evicts_enough_and_no_more_than_needed_or_says_when_there_may_be_room(
    models: list[MemoryUse], needed: int, budget: int
) -> None:
    free = [each for each in models if not each.kept_by and each.evictable_at <= NOW]
    decision = make_room(models, needed, budget, NOW)

    if isinstance(decision, Full):
        assert used_bytes(models) - used_bytes(free) + needed > budget
        pinned = used_bytes(each for each in models if each.kept_by == "pinned")
        assert (decision.until == inf) == (pinned + needed > budget)
        return
    evicted = [each for each in models if each.key in decision.keys]
    assert set(decision.keys) <= {each.key for each in free}
    left = used_bytes(models) - used_bytes(evicted) + needed
    assert left <= budget
    assert all(left + each.bytes > budget for each in evicted)
