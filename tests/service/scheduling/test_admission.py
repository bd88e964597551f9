from math import ceil, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import DeadlineExceeded, InvalidRequest, QueueFull, ShuttingDown
from service.execution.plan import BatchPlan
from service.scheduling.dispatcher import Dispatcher
from service.scheduling.lanes import Lane
from tests.service.scheduling.simulation import Seen, Simulation, make_lane

ONE = BatchPlan({1: 1.0})
PLANS = st.sampled_from(
    [ONE, BatchPlan({1: 0.5, 2: 0.9}), BatchPlan({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4}), BatchPlan({1: 3.0, 4: 3.5})]
)


def board(instances: int, *lanes: Lane[int, int, int]) -> Dispatcher[int, int, int]:
    dispatcher = Dispatcher[int, int, int](instances, 1, Seen())
    dispatcher.lanes.extend(lanes)
    return dispatcher


def test_a_full_lane_refuses_at_once_and_says_when_to_come_back() -> None:
    lane = make_lane("m", BatchPlan({1: 1.0, 8: 1.6}), capacity=8)
    dispatcher = board(2, lane)
    dispatcher.admit(lane, 6, 0.0)

    with pytest.raises(QueueFull, match="6 images wait for 'm' and PVT_QUEUE_SIZE allows 8; 3 more") as refused:
        dispatcher.admit(lane, 3, 0.0)

    assert refused.value.retry_after_seconds == pytest.approx(6 * (1.6 / 8) / 2)
    assert lane.admitted == 6


def test_places_that_are_given_back_can_be_taken_again() -> None:
    lane = make_lane("m", ONE, capacity=3)
    dispatcher = board(1, lane)
    places = dispatcher.admit(lane, 3, 0.0)

    dispatcher.release(places, 2)
    dispatcher.admit(lane, 2, 0.0)

    assert lane.admitted == 3


def test_a_request_larger_than_the_queue_is_refused_for_good() -> None:
    lane = make_lane("m", ONE, capacity=4)

    with pytest.raises(InvalidRequest, match="5 images in one request; PVT_QUEUE_SIZE allows 4"):
        board(1, lane).admit(lane, 5, 0.0)


def test_a_closed_door_takes_nobody() -> None:
    lane = make_lane("m", ONE)
    dispatcher = board(1, lane)
    dispatcher.close()

    with pytest.raises(ShuttingDown):
        dispatcher.admit(lane, 1, 0.0)


def test_a_deadline_that_the_queue_makes_hopeless_is_refused_with_the_estimate_and_what_to_do() -> None:
    lane = make_lane("m", ONE)
    dispatcher = board(2, lane)
    for _ in range(41):
        dispatcher.admit(lane, 1, 100.0)

    with pytest.raises(DeadlineExceeded) as refused:
        dispatcher.admit(lane, 1, 100.0, deadline=105.0)

    assert str(refused.value) == (
        "41 images wait for 'm' already: at the measured speed an answer is 21 s away or more, and 5 s are left; "
        "allow more with timeout_ms, or send it again later"
    )
    assert lane.admitted == 41


def test_a_deadline_that_only_a_faster_machine_could_meet_is_taken() -> None:
    lane = make_lane("m", ONE)
    dispatcher = board(2, lane)
    dispatcher.admit(lane, 41, 0.0)

    dispatcher.admit(lane, 1, 0.0, deadline=10.5)

    assert lane.admitted == 42


@given(st.integers(1, 64), st.floats(0.0, 0.001))
def test_an_idle_service_refuses_no_deadline(images: int, seconds: float) -> None:
    lane, other = make_lane("m", BatchPlan({1: 10.0})), make_lane("other", ONE)

    board(1, lane, other).admit(lane, images, 50.0, deadline=50.0 + seconds)

    assert lane.admitted == images


def test_what_waits_for_another_model_lengthens_retry_after_as_far_as_it_gets_its_turn_first() -> None:
    lane, flood, few = make_lane("m", ONE), make_lane("flood", ONE), make_lane("few", ONE)
    dispatcher = board(1, lane, flood, few)
    dispatcher.admit(flood, 1000, 0.0)
    dispatcher.admit(few, 2, 0.0)
    dispatcher.admit(lane, 9, 0.0)

    assert dispatcher.seconds_until_empty(lane) == 9 + 9 + 2


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(PLANS, st.integers(0, 40)), min_size=1, max_size=4),
    st.tuples(st.floats(0, 5), st.floats(1.0, 2.0)),
    st.integers(1, 6),
    st.floats(0, 60),
)
def test_what_is_refused_for_its_deadline_would_have_been_late_even_on_a_faster_machine(
    instances: int, load: list[tuple[BatchPlan, int]], pace: tuple[float, float], images: int, allowed: float
) -> None:
    after, speed = pace
    simulation = Simulation(instances, decoders=4, speed=speed)
    lanes = [simulation.lane(str(i), plan) for i, (plan, _) in enumerate(load)]
    for lane, (_, waiting) in zip(lanes, load, strict=True):
        if waiting:
            simulation.send(lane, waiting)
    simulation.run(until=after)
    deadline = simulation.now + allowed
    try:
        places = simulation.dispatcher.admit(lanes[0], images, simulation.now, deadline)
    except DeadlineExceeded:
        refused = True
    else:
        refused = False
        simulation.dispatcher.release(places)

    sent = simulation.send(lanes[0], images)
    simulation.run()

    if refused:
        assert max(each.ended for each in sent) > deadline


@settings(deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(PLANS, st.integers(1, 60)), min_size=1, max_size=4))
def test_who_comes_back_after_retry_after_finds_the_queue_worked_off(
    instances: int, load: list[tuple[BatchPlan, int]]
) -> None:
    simulation = Simulation(instances, decoders=4)
    lanes = [simulation.lane(str(i), plan) for i, (plan, _) in enumerate(load)]
    sent = [simulation.send(lane, waiting) for lane, (_, waiting) in zip(lanes, load, strict=True)]
    promised = simulation.dispatcher.seconds_until_empty(lanes[0])

    simulation.run()

    worked_off = max(each.ended for each in sent[0])
    # Batches end as a whole, the last ones are not full, and nobody interrupts another model's.
    whole = max(plan.time(plan.largest) for plan, _ in load) * (len(load) + 2)
    assert promised == pytest.approx(worked_off, abs=whole)
    assert ceil(promised) < inf
