from collections.abc import Callable
from typing import Any

import pytest

from service.errors import DeadlineExceeded, OutOfMemory, ShuttingDown
from service.execution.plan import BatchPlan
from service.scheduling.dispatcher import Dispatcher
from service.scheduling.lanes import Call, Completed, Lane, Outcome, Running
from tests.service.scheduling.simulation import Seen, Simulation, make_lane, places_of

PLAN = BatchPlan({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4})
Board = Dispatcher[int, int, int]


def board(instances: int = 1, decoders: int = 1, seen: Seen | None = None, **options: Any) -> tuple[Board, Any]:
    dispatcher = Board(instances, decoders, seen or Seen(), **options)
    lane = make_lane("m", PLAN)
    dispatcher.lanes.append(lane)
    return dispatcher, lane


def call(dispatcher: Board, lane: Lane[int, int, int], source: int, now: float = 0.0, **times: float) -> Any:
    places = dispatcher.admit(lane, 1, now)
    made = Call[int, int, int](lane, source)
    dispatcher.add(made, now, places=places, **times)
    return made


def decode_all(dispatcher: Board, now: float = 0.0) -> None:
    """Decode what waits, as long as that is what is to be done next."""
    while isinstance(job := dispatcher.next_job(now), Call):
        dispatcher.decoded(job, job.source, now)
    assert job is None


def running(dispatcher: Board, now: float = 0.0) -> Running[int, int, int]:
    job = dispatcher.next_job(now)
    assert isinstance(job, Running)
    return job


def decoded(dispatcher: Board, *calls: Any) -> None:
    for _ in calls:
        job = dispatcher.next_job(0.0)
        assert isinstance(job, Call)
        dispatcher.decoded(job, job.source, 0.0)


def busy_board(**options: Any) -> tuple[Board, Any, Running[int, int, int]]:
    """An instance that runs the image 0, so that what comes waits."""
    dispatcher, lane = board(**options)
    decoded(dispatcher, call(dispatcher, lane, 0))
    return dispatcher, lane, running(dispatcher)


def outcomes(dispatcher: Board) -> dict[int, Outcome[int]]:
    return {each.source: outcome for each, outcome in dispatcher.take_ended()}


def test_an_image_is_decoded_and_runs_and_its_end_is_told_once() -> None:
    dispatcher, lane = board()
    call(dispatcher, lane, 3, now=10.0)

    decoding = dispatcher.next_job(11.0)
    assert isinstance(decoding, Call)
    dispatcher.decoded(decoding, 3, 12.0)
    job = running(dispatcher, 15.0)
    dispatcher.ran(job, [6], 19.0)

    assert outcomes(dispatcher) == {
        3: Completed(
            6,
            wait_seconds=1.0,
            decode_seconds=1.0,
            queue_seconds=3.0,
            run_seconds=4.0,
            batch_size=1,
            reason="idle",
            began=15.0,
        )
    }
    assert outcomes(dispatcher) == {}
    assert dispatcher.next_job(20.0) is None


def test_a_batch_comes_before_decoding() -> None:
    dispatcher, lane = board(decoders=2)
    decoded(dispatcher, call(dispatcher, lane, 1))
    call(dispatcher, lane, 2)

    assert isinstance(dispatcher.next_job(0.0), Running)
    assert isinstance(dispatcher.next_job(0.0), Call)


def test_no_more_is_decoded_at_once_than_there_are_decoders() -> None:
    dispatcher, lane = board(decoders=2)
    for source in range(3):
        call(dispatcher, lane, source)

    assert [type(dispatcher.next_job(0.0)) for _ in range(3)] == [Call, Call, type(None)]
    assert not dispatcher.has_work()


def test_a_lone_image_runs_alone() -> None:
    dispatcher, lane = board(instances=2)
    decoded(dispatcher, call(dispatcher, lane, 1))

    assert running(dispatcher).release.alone


@pytest.mark.parametrize("stage", ["admitted", "to decode", "decoding", "running"])
def test_with_another_anywhere_in_the_scheduler_nobody_is_alone(stage: str) -> None:
    dispatcher, lane = board(instances=2, decoders=2)
    other = make_lane("other", PLAN)
    dispatcher.lanes.append(other)
    if stage == "running":
        decoded(dispatcher, call(dispatcher, other, 9))
        other_job = running(dispatcher)
        assert other_job.release.alone
        dispatcher.abandon(other_job.part[0])
        dispatcher.release(places_of(other_job.part[0]))  # its caller has gone, and yet it runs
    first = call(dispatcher, lane, 1)
    if stage == "admitted":
        dispatcher.admit(other, 1, 0.0)
    if stage in {"to decode", "decoding"}:
        dispatcher.add(Call(other, 9), 0.0)
        first_decode, *_ = [dispatcher.next_job(0.0) for _ in range(1 if stage == "to decode" else 2)]
        assert isinstance(first_decode, Call)
        dispatcher.decoded(first_decode, first.source, 0.0)
    else:
        decoded(dispatcher, first)

    assert not running(dispatcher).release.alone


def test_a_batch_of_several_is_not_alone() -> None:
    dispatcher, lane, first = busy_board()
    calls = [call(dispatcher, lane, source) for source in (1, 2)]
    decoded(dispatcher, *calls)
    dispatcher.ran(first, [0], 1.0)
    for each in calls:
        dispatcher.release(places_of(each))

    job = running(dispatcher)
    assert (len(job.part), job.release.alone) == (2, False)


@pytest.mark.parametrize("when", ["to decode", "decoding", "waiting"])
def test_an_image_whose_caller_has_gone_never_runs(when: str) -> None:
    seen = Seen()
    dispatcher, lane, first = busy_board(seen=seen)
    gone = call(dispatcher, lane, 1)
    job = None if when == "to decode" else dispatcher.next_job(0.0)
    if when == "waiting" and isinstance(job, Call):
        dispatcher.decoded(job, 1, 0.0)

    dispatcher.abandon(gone)
    dispatcher.abandon(gone)

    if when == "decoding" and isinstance(job, Call):
        dispatcher.decoded(job, 1, 0.0)
    dispatcher.ran(first, [0], 1.0)
    assert dispatcher.next_job(2.0) is None
    assert seen.stages == ["queue" if when == "waiting" else "decode"]
    assert 1 not in outcomes(dispatcher)


def test_a_caller_that_goes_while_its_batch_runs_harms_nobody_and_is_counted() -> None:
    seen = Seen()
    dispatcher, lane, first = busy_board(seen=seen)
    calls = [call(dispatcher, lane, source) for source in (1, 2)]
    decoded(dispatcher, *calls)
    dispatcher.ran(first, [0], 0.0)
    job = running(dispatcher)

    dispatcher.abandon(calls[0])
    dispatcher.ran(job, [2, 4], 1.0)

    assert seen.stages == ["infer"]
    assert {*outcomes(dispatcher)} == {0, 2}


@pytest.mark.parametrize("decoded_before", [False, True])
def test_an_image_whose_time_runs_out_while_it_waits_costs_nothing_more(decoded_before: bool) -> None:
    seen = Seen()
    dispatcher, lane, first = busy_board(seen=seen)
    late = call(dispatcher, lane, 1, deadline=5.0)
    if decoded_before:
        decoded(dispatcher, late)

    dispatcher.ran(first, [0], 6.0)

    assert dispatcher.next_job(6.0) is None
    assert isinstance(outcomes(dispatcher)[1], DeadlineExceeded)
    assert seen.stages == ["queue" if decoded_before else "decode"]


def test_an_image_that_can_not_be_decoded_fails_alone() -> None:
    dispatcher, lane = board(decoders=2)
    call(dispatcher, lane, 1)
    call(dispatcher, lane, 2)
    bad, good = (dispatcher.next_job(0.0) for _ in range(2))
    assert isinstance(bad, Call)
    assert isinstance(good, Call)

    dispatcher.decoded(bad, ValueError("no image"), 0.0)
    dispatcher.decoded(good, 2, 0.0)
    dispatcher.ran(running(dispatcher), [4], 0.0)

    ended = outcomes(dispatcher)
    assert isinstance(ended[1], ValueError)
    assert isinstance(ended[2], Completed)


def bisect(
    dispatcher: Board, job: Running[int, int, int], fails: Callable[[list[int]], Exception | None]
) -> list[list[int]]:
    """Run `job` to its end, and what it ran."""
    parts = []
    while job.part:
        payloads = job.payloads()
        parts.append(payloads)
        dispatcher.ran(job, fails(payloads) or [2 * each for each in payloads], 1.0)
    return parts


def test_a_poisoned_image_fails_alone() -> None:
    dispatcher, lane, first = busy_board()
    decoded(dispatcher, *(call(dispatcher, lane, source) for source in range(1, 9)))
    dispatcher.ran(first, [0], 1.0)

    parts = bisect(dispatcher, running(dispatcher), lambda part: ValueError("poison") if 5 in part else None)

    assert parts == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4], [5, 6, 7, 8], [5, 6], [5], [6], [7, 8]]
    failed = {source for source, outcome in outcomes(dispatcher).items() if isinstance(outcome, Exception)}
    assert failed == {5}


def test_the_halves_of_a_failed_batch_leave_out_whoever_has_gone_meanwhile() -> None:
    dispatcher, lane, first = busy_board()
    calls = [call(dispatcher, lane, source) for source in range(1, 5)]
    decoded(dispatcher, *calls)
    dispatcher.ran(first, [0], 1.0)
    job = running(dispatcher)

    for gone in (1, 2, 3):
        dispatcher.abandon(calls[gone - 1])
    parts = bisect(dispatcher, job, lambda part: ValueError("poison") if len(part) > 1 else None)

    assert parts == [[1, 2, 3, 4], [4]]


def test_a_batch_that_does_not_fit_is_halved_and_its_size_given_up() -> None:
    dispatcher, lane, first = busy_board()
    decoded(dispatcher, *(call(dispatcher, lane, source) for source in range(1, 9)))
    dispatcher.ran(first, [0], 1.0)

    bisect(dispatcher, running(dispatcher), lambda part: OutOfMemory("no room") if len(part) > 2 else None)

    assert lane.plan.sizes == (1, 2)
    assert lane.payloads.plan.largest == 2
    assert all(isinstance(outcome, Completed) for outcome in outcomes(dispatcher).values())


def test_a_batch_with_too_few_results_fails_instead_of_mixing_answers_up() -> None:
    dispatcher, _, first = busy_board()

    dispatcher.ran(first, [], 1.0)

    error = outcomes(dispatcher)[0]
    assert isinstance(error, RuntimeError)
    assert str(error) == "a batch of 1 gave 0 results"


def test_giving_up_ends_whatever_is_there() -> None:
    dispatcher, lane, first = busy_board(decoders=2)
    waiting, decoding, to_decode = (call(dispatcher, lane, source) for source in (1, 2, 3))
    decoded(dispatcher, waiting)
    job = dispatcher.next_job(0.0)
    assert isinstance(job, Call)
    assert job is decoding

    dispatcher.end_all()
    ended = outcomes(dispatcher)
    dispatcher.decoded(job, 2, 1.0)
    dispatcher.ran(first, [0], 1.0)

    assert {*ended} == {0, 1, 2, 3}
    assert {type(outcome) for outcome in ended.values()} == {ShuttingDown}
    assert outcomes(dispatcher) == {}
    assert dispatcher.next_job(2.0) is None
    assert to_decode.stage == "ended"


def test_with_a_delay_it_says_when_to_ask_again_and_closing_waits_no_longer() -> None:
    dispatcher, lane = board(max_delay_seconds=5.0)
    decoded(dispatcher, call(dispatcher, lane, 1))

    assert dispatcher.next_job(1.0) == 5.0
    dispatcher.close()
    assert isinstance(dispatcher.next_job(1.0), Running)


def test_decoding_is_shared_fairly_among_models_by_what_it_takes() -> None:
    dispatcher, large = board()
    small = make_lane("small", PLAN)
    dispatcher.lanes.append(small)
    for source in range(100):
        call(dispatcher, large, source)
        call(dispatcher, small, source)
    now, decoded_of = 0.0, {"m": 0, "small": 0}

    while now < 100:
        job = dispatcher.next_job(now)
        if isinstance(job, Running):
            continue
        assert isinstance(job, Call)
        now += 9.0 if job.lane is large else 1.0
        dispatcher.decoded(job, ValueError("enough"), now)
        decoded_of[job.lane.name] += 1

    assert decoded_of["small"] == pytest.approx(9 * decoded_of["m"], abs=9)


@pytest.mark.parametrize("decoders", [1, 4])
def test_a_trickle_beside_a_flood_waits_for_what_has_begun_and_no_longer(decoders: int) -> None:
    simulation = Simulation(instances=2, decoders=decoders, decode_seconds=0.3)
    flood = simulation.lane("flood", BatchPlan({1: 1.0, 4: 3.6}))
    trickle = simulation.lane("trickle", BatchPlan({1: 0.5}))
    simulation.send(flood, 1000)
    sent = []
    for second in range(10, 60, 5):
        simulation.run(until=second + 0.1)
        sent += simulation.send(trickle)

    simulation.run(until=100.0)

    own, begun = 0.3 + 0.5, 0.3 + 3.6
    assert max(each.seconds for each in sent) <= own + begun
    assert len(flood.payloads.waiting) + len(flood.sources.waiting) > 0


def test_what_it_does_can_be_looked_at() -> None:
    dispatcher, lane, _ = busy_board(instances=2, decoders=2)
    call(dispatcher, lane, 1)
    call(dispatcher, lane, 2)
    call(dispatcher, lane, 3)
    dispatcher.next_job(3.0)
    dispatcher.next_job(3.0)

    activity = dispatcher.activity(7.0)

    (queue,) = activity.queues
    assert (queue.waiting_decode, queue.decoding, queue.queued, queue.running, queue.admitted) == (1, 2, 0, 1, 4)
    assert queue.plan == {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4}
    (past,) = activity.releases
    assert activity.instances.count(None) == 1
    assert (busy := activity.instances[past.instance])
    assert (activity.now, busy.started, past.started, past.run_seconds) == (7.0, 0.0, 0.0, None)
    assert dispatcher.stalled_seconds(7.0) == {"decode": 4.0, "infer": 7.0}
    assert repr(dispatcher) == "<Dispatcher to_decode=1 decoding=2/2 waiting=0 busy=1/2>"


def test_it_remembers_the_last_64_releases() -> None:
    simulation = Simulation(instances=1)
    lane = simulation.lane("m", BatchPlan({1: 1.0}))
    simulation.send(lane, 100)
    simulation.run()

    releases = simulation.dispatcher.activity(simulation.now).releases

    assert len(releases) == 64
    assert [past.started for past in releases] == [float(99 - i) for i in range(64)]
    assert {past.run_seconds for past in releases} == {1.0}
