"""Who gets how much: clients, their requests, large images; and deadlines under overload, in simulated time."""

from collections import Counter

import pytest

from service.errors import DeadlineExceeded, QueueFull
from service.execution.plan import BatchPlan
from service.scheduling.lanes import Completed, Lane
from tests.service.scheduling.simulation import Sent, Simulation

PLAN = BatchPlan({1: 0.001, 2: 0.0018, 4: 0.0033, 8: 0.006})  # 1333 images/s of an instance at the most


def answered(sent: list[Sent]) -> list[Sent]:
    return [each for each in sent if isinstance(each.outcome, Completed)]


@pytest.mark.parametrize("decode_seconds", [0.0001, 0.004])
def test_two_hundred_images_of_one_client_hold_another_up_by_what_has_begun(decode_seconds: float) -> None:
    simulation = Simulation(instances=1, decoders=1, decode_seconds=decode_seconds)
    lane = simulation.lane("m", PLAN, capacity=256)
    for _ in range(200):
        simulation.send(lane, client="greedy")
    sent = []
    for turn in range(1, 10):
        simulation.run(until=0.01 * turn)
        sent += simulation.send(lane, client="polite")

    simulation.run()

    assert max(each.seconds for each in sent) <= 2 * (decode_seconds + PLAN.time(8))


def test_a_request_of_one_image_does_not_wait_for_the_64th_of_another_of_the_same_client() -> None:
    simulation = Simulation(instances=1, decoders=1, decode_seconds=0.01)
    lane = simulation.lane("m", PLAN)
    many = simulation.send(lane, 64)
    (one,) = simulation.send(lane, 1)

    simulation.run()

    assert one.seconds <= 3 * 0.01 + PLAN.time(1)  # what has begun, one in turn, and its own
    assert len(answered(many)) == 64


@pytest.mark.parametrize("decoders", [1, 2, 8])
def test_small_images_do_not_wait_for_large_ones(decoders: int) -> None:
    simulation = Simulation(instances=1, decoders=decoders, decode_seconds=0.001)
    lane = simulation.lane("m", PLAN, capacity=256)
    large = simulation.send(lane, 64, megapixels=49.0)
    simulation.run(until=0.5)
    (small,) = simulation.send(lane)

    simulation.run()

    assert small.seconds <= 0.001 + PLAN.time(1) + PLAN.time(8)
    assert len(answered(large)) == 64


def test_large_images_take_a_part_of_the_places_and_are_told_how_long_decoding_takes() -> None:
    simulation = Simulation(instances=1, decoders=2, decode_seconds=0.002)
    lane = simulation.lane("m", PLAN, capacity=256)
    first = simulation.send(lane, 64, megapixels=49.0)
    simulation.run(until=1.0)

    with pytest.raises(QueueFull, match="large images wait") as refused:
        simulation.send(lane, 64, megapixels=49.0)

    simulation.run()
    assert refused.value.retry_after_seconds == pytest.approx(max(each.ended for each in first) - 1.0, rel=0.1)
    assert simulation.send(lane, 64)


def test_decoding_is_shared_among_clients_by_the_time_that_it_takes() -> None:
    simulation = Simulation(instances=1, decoders=1, decode_seconds=0.001)
    lane = simulation.lane("m", PLAN, capacity=2000)
    heavy = simulation.send(lane, 10, client="heavy", megapixels=40.0)
    light = simulation.send(lane, 100, client="light", megapixels=4.1)

    simulation.run(until=0.4)

    assert len(answered(light)) == pytest.approx(48, abs=12)
    assert len(answered(heavy)) == pytest.approx(5, abs=2)


def test_a_client_with_less_than_its_share_gets_a_place_of_the_one_that_holds_most() -> None:
    simulation = Simulation(instances=1, decoders=1, decode_seconds=0.001)
    lane = simulation.lane("m", PLAN, capacity=16)
    greedy = [each for _ in range(16) for each in simulation.send(lane, client="greedy")]

    (polite,) = simulation.send(lane, client="polite")
    with pytest.raises(QueueFull):
        simulation.send(lane, client="greedy")
    simulation.run()

    assert isinstance(polite.outcome, Completed)
    refused = [each for each in greedy if isinstance(each.outcome, QueueFull)]
    assert refused == [greedy[-1]]
    assert (lane.admitted, lane.held, lane.requests) == (0, {}, {})


def test_many_clients_with_one_image_each_push_nobody_out() -> None:
    simulation = Simulation(instances=1)
    lane = simulation.lane("m", PLAN, capacity=8)
    sent = [each for i in range(8) for each in simulation.send(lane, client=str(i))]

    with pytest.raises(QueueFull):
        simulation.send(lane, client="late")

    simulation.run()
    assert len(answered(sent)) == 8


def overload(times_capacity: float, clients: int = 1, seconds: float = 3.0) -> tuple[float, Counter[str]]:
    """Images answered by a deadline of 0.2 s, as a share of the capacity; and what became of all."""
    simulation = Simulation(instances=1, decoders=1, decode_seconds=0.0001, speed=0.5)  # half of what the plan says
    lane = simulation.lane("m", PLAN, capacity=256)
    capacity = 0.5 * 8 / PLAN.time(8)
    sent, became = list[Sent](), Counter[str]()
    count = int(times_capacity * capacity * seconds)
    for i in range(count):
        simulation.run(until=i * seconds / count)
        try:
            sent += simulation.send(lane, deadline=simulation.now + 0.2, client=str(i % clients))
        except (DeadlineExceeded, QueueFull) as error:
            became[type(error).__name__] += 1
    simulation.run()
    in_time = [each for each in answered(sent) if each.seconds <= 0.2]
    became.update(type(each.outcome).__name__ for each in sent)
    return len(in_time) / (capacity * seconds), became


@pytest.mark.parametrize("clients", [1, 50])
@pytest.mark.parametrize("times_capacity", [2.0, 4.0])
def test_in_time_answers_hold_under_overload(clients: int, times_capacity: float) -> None:
    share, became = overload(times_capacity, clients)

    assert share >= 0.9, became


def test_what_runs_under_overload_ends_in_time() -> None:
    simulation = Simulation(instances=1, decoders=1, decode_seconds=0.0001)
    lane: Lane[int, int, int] = simulation.lane("m", PLAN, capacity=256)
    simulation.send(lane, 100)
    sent = [each for _ in range(50) for each in simulation.send(lane, deadline=0.04)]

    simulation.run()

    assert all(each.ended <= 0.04 for each in answered(sent))
    assert any(isinstance(each.outcome, DeadlineExceeded) for each in sent)
