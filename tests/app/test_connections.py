"""One turn of the event loop begins few requests; the limit of open files is raised."""

import asyncio

import pytest

from app.connections import BEGUN_PER_TURN, Connections, descriptor_limit


async def until_begun(order: list[int], count: int) -> int:
    """How many turns it took."""
    for turn in range(1000):
        if len(order) == count:
            return turn
        await asyncio.sleep(0)
    pytest.fail("some never begin")


async def test_a_turn_begins_few_requests_in_their_order_and_a_probe_at_once() -> None:
    state, order = Connections(client_seconds=1), list[int]()
    for number in range(100):
        state.begin(lambda number=number: order.append(number), first=False)  # type: ignore[misc]
    assert order == [*range(BEGUN_PER_TURN)]

    state.begin(lambda: order.append(-1), first=True)
    assert order[-1] == -1

    turns = await until_begun(order, 101)
    assert turns >= 100 // BEGUN_PER_TURN
    assert [number for number in order if number >= 0] == [*range(100)]


def test_the_limit_of_open_files_is_raised_as_far_as_it_may() -> None:
    assert descriptor_limit() == descriptor_limit() > 0
