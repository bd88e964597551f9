from concurrent.futures import ThreadPoolExecutor

import pytest

from service.errors import MemoryExhausted
from service.memory import SMALL_BYTES, MemoryBudget, budget

MB = 1_000_000


def test_what_does_not_fit_is_refused_with_the_figures_and_nothing_is_reserved() -> None:
    memory = MemoryBudget(160 * MB)
    held = memory.reserve(100 * MB, "bodies")

    with pytest.raises(
        MemoryExhausted, match=r"60\.0 MB for answers .* 100\.0 of 160\.0 MB .*PVT_MEMORY_MB"
    ) as refused:
        memory.reserve(60 * MB, "answers")

    assert refused.value.retry_after_seconds
    assert memory.try_reserve(60 * MB, "answers") is None
    assert memory.reserved() == {"bodies": 100 * MB}
    held.release()
    assert memory.reserve(60 * MB, "answers").count == 60 * MB


def test_a_reservation_is_released_once() -> None:
    memory = MemoryBudget(160 * MB)

    with memory.reserve(10 * MB, "bodies") as held:
        held.grow(20 * MB)
        assert memory.reserved() == {"bodies": 30 * MB}
        held.shrink(5 * MB)
        assert memory.reserved() == {"bodies": 25 * MB}
        held.release()

    held.release()
    assert memory.reserved() == {"bodies": 0}


def test_small_reservations_go_on_where_large_ones_have_taken_all_they_may() -> None:
    memory = MemoryBudget(160 * MB, {"bodies": 80 * MB})
    memory.reserve(80 * MB, "bodies")
    memory.reserve(70 * MB, "answers")

    small = [memory.reserve(SMALL_BYTES, what) for what in ("bodies", "answers", "decoding")]

    with pytest.raises(MemoryExhausted):
        small[0].grow(1)  # it would be large
    with pytest.raises(MemoryExhausted):
        memory.reserve(SMALL_BYTES + 1, "answers")


def test_one_thing_has_no_more_than_its_share() -> None:
    memory = MemoryBudget(1000 * MB, {"bodies": 100 * MB})
    held = memory.reserve(90 * MB, "bodies")

    with pytest.raises(MemoryExhausted, match=r"90\.0 MB of at most 100\.0 are in use for bodies"):
        held.check(11 * MB)

    held.grow(10 * MB)
    memory.reserve(800 * MB, "loads")


def test_without_a_limit_everything_fits_and_is_counted() -> None:
    memory = budget(0, 32 * MB, 128 * MB)

    memory.reserve(10**15, "loads")

    assert memory.limit == 0
    assert memory.reserved() == {"loads": 10**15}


def test_the_budget_is_what_the_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.memory.resident_bytes", lambda: 300 * MB)

    assert budget(1000 * MB, 32 * MB, 128 * MB).limit == 575 * MB
    assert budget(1000 * MB, 32 * MB, 128 * MB).most == {"bodies": 287_500_000, "answers": 287_500_000}
    assert budget(64_000 * MB, 32 * MB, 128 * MB).most == {"bodies": 1024 * MB, "answers": 1024 * MB}
    assert budget(200 * MB, 32 * MB, 128 * MB).limit == 64 * MB


def test_threads_count_together() -> None:
    memory = MemoryBudget(160 * MB)

    def often(_: int) -> None:
        for _ in range(2000):
            if held := memory.try_reserve(40 * MB, "decoding"):
                held.release()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(often, range(4)))

    assert memory.reserved() == {"decoding": 0}
