"""Large images wait for memory and for one another; small ones for nothing."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from time import monotonic

import pytest

from service.errors import MemoryExhausted
from service.images.costs import Cost
from service.memory import MODELS, MemoryBudget
from service.pipeline import LargeImages

MB = 1_000_000
LARGE = Cost(49 * MB, 200 * MB)


def held(large: LargeImages, cost: Cost, entered: Event, leave: Event) -> None:
    with large.reserved(monotonic() + 30, cost):
        entered.set()
        leave.wait(30)


@pytest.fixture
def start() -> Callable[..., tuple[Future[None], Event, Event]]:
    def start_(threads: ThreadPoolExecutor, large: LargeImages, cost: Cost) -> tuple[Future[None], Event, Event]:
        entered, leave = Event(), Event()
        return threads.submit(held, large, cost, entered, leave), entered, leave

    return start_


def test_a_second_large_image_waits_for_the_first_and_a_small_one_for_none(
    start: Callable[..., tuple[Future[None], Event, Event]],
) -> None:
    large = LargeImages(MemoryBudget(1000 * MB))
    with ThreadPoolExecutor(3) as threads:
        first, entered, leave = start(threads, large, LARGE)
        assert entered.wait(30)
        second, entered_second, leave_second = start(threads, large, LARGE)
        small, entered_small, leave_small = start(threads, large, Cost(1, MB))

        assert entered_small.wait(30)
        assert not entered_second.is_set()

        leave.set()
        assert entered_second.wait(30)
        for each in (leave_second, leave_small):
            each.set()
        for future in (first, second, small):
            future.result(30)


def test_memory_that_others_hold_is_waited_for_until_shortly_before_the_deadline() -> None:
    memory = MemoryBudget(300 * MB)
    others, large = memory.reserve(150 * MB, "bodies"), LargeImages(memory)

    with (
        pytest.raises(MemoryExhausted, match="200 MB, which were not free in time"),
        large.reserved(monotonic() + 0.05, LARGE),
    ):
        pass

    others.release()
    with large.reserved(monotonic() + 30, LARGE):
        assert memory.reserved()["decoding"] == 200 * MB
    assert memory.reserved()["decoding"] == 0


def test_an_image_that_never_fits_beside_the_models_is_refused_at_once() -> None:
    memory = MemoryBudget(320 * MB)
    memory.reserve(150 * MB, MODELS)

    with (
        pytest.raises(MemoryExhausted, match=r"200 MB for decoding do not fit into the 300 MB .* 150 are in use"),
        LargeImages(memory).reserved(monotonic() + 1000, LARGE),
    ):
        pass
