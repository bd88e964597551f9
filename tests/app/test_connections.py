"""One turn of the event loop begins few requests; the limit of open files is raised."""

import asyncio
from collections.abc import Sequence
from functools import partial

import pytest

from app.connections import BEGUN_PER_TURN, Connections, descriptor_limit


async def until_begun(order: Sequence[object], count: int) -> int:
    """How many turns it took."""
    for turn in range(1000):
        if len(order) == count:
            return turn
        await asyncio.sleep(0)
    pytest.fail("some never begin")


def connections() -> Connections:
    return Connections(client_seconds=1, identify=lambda scope: scope["who"])


async def test_a_turn_begins_few_requests_in_their_order_and_a_probe_at_once() -> None:
    state, order = connections(), list[int]()
    for number in range(100):
        state.begin(partial(order.append, number), {"who": "one", "state": {}}, first=False)
    assert order == [*range(BEGUN_PER_TURN)]

    state.begin(partial(order.append, -1), {"who": "one", "state": {}}, first=True)
    assert order[-1] == -1

    turns = await until_begun(order, 101)
    assert turns >= 100 // BEGUN_PER_TURN - 1
    assert [number for number in order if number >= 0] == [*range(100)]


async def test_who_has_many_requests_waits_for_its_own() -> None:
    state, order = connections(), list[str]()
    for _ in range(50):
        state.begin(partial(order.append, "greedy"), {"who": "greedy", "state": {}}, first=False)
    for who in ("polite", "other", "polite"):
        state.begin(partial(order.append, who), {"who": who, "state": {}}, first=False)

    await until_begun(order, 53)
    assert order[:BEGUN_PER_TURN] == ["greedy"] * BEGUN_PER_TURN
    assert order[BEGUN_PER_TURN:][:5] == ["greedy", "polite", "other", "greedy", "polite"]


def test_the_limit_of_open_files_is_raised_as_far_as_it_may() -> None:
    assert descriptor_limit() == descriptor_limit() > 0


def test_probes_come_first_below_the_root_path_too() -> None:
    made = partial(Connections, client_seconds=1, identify=lambda scope: scope["who"], root_path="/pvt")
    state, platform = made(), made(health_route="/ready")

    for path in ("/health/live", "/v2/health/ready", "/ping", "/metrics"):
        assert {path, f"/pvt{path}"} <= state.probes
    assert {"/ready", "/pvt/ready"} <= platform.probes
    assert not {"", "/", "/pvt", "/pvt/predict", "/health/live/pvt"} & state.probes
