import asyncio
from collections.abc import Sequence
from time import monotonic

import pytest

from service.errors import DeadlineExceeded, InvalidRequest, OutOfMemory, QueueFull, ShuttingDown
from service.plan import BatchPlan
from service.scheduler import Completed, Lane, Scheduler

PLAN = BatchPlan({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4})


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.releases: list[tuple[str, str, int]] = []
        self.cancellations: list[str] = []

    def batch_released(self, model: str, reason: str, size: int) -> None:
        self.releases.append((model, reason, size))

    def cancelled(self, stage: str) -> None:
        self.cancellations.append(stage)


class Machine:
    """Instances that work only while the gate is open, and double what they get; `bad` payloads fail."""

    def __init__(self, *, open_: bool = True, bad: frozenset[int] = frozenset(), memory: int = 100) -> None:
        self.gate = asyncio.Event()
        self.started = asyncio.Event()
        self.batches: list[list[int]] = []
        self.instances: list[int] = []
        self._bad, self._memory = bad, memory
        if open_:
            self.gate.set()

    async def run(self, instance: int, payloads: Sequence[int]) -> Sequence[int]:
        self.batches.append(list(payloads))
        self.instances.append(instance)
        self.started.set()
        await self.gate.wait()
        if len(payloads) > self._memory:
            raise OutOfMemory("too many")
        if poison := self._bad.intersection(payloads):
            raise ValueError(f"poisoned by {sorted(poison)}")
        return [2 * each for each in payloads]


def start(
    machine: Machine, *, instances: int = 1, seen: Seen | None = None, capacity: int = 100, plan: BatchPlan = PLAN
) -> tuple[Scheduler[int, int], Lane[int, int]]:
    scheduler = Scheduler[int, int](instances, seen or Seen())
    return scheduler, scheduler.open_lane("m", plan, machine.run, capacity)


async def submit_all(
    scheduler: Scheduler[int, int], lane: Lane[int, int], payloads: Sequence[int]
) -> list[asyncio.Task[Completed[int]]]:
    """Tasks that have all reached the queue; what an idle instance could take is running."""
    tasks = [asyncio.create_task(scheduler.submit(lane, each)) for each in payloads]
    await asyncio.sleep(0)  # the callers' turn
    await asyncio.sleep(0)  # the turn of the batches that they released
    return tasks


async def test_each_caller_gets_its_own_result() -> None:
    scheduler, lane = start(Machine(), instances=2)

    results = await asyncio.gather(*(scheduler.submit(lane, i) for i in range(50)))

    assert [each.result for each in results] == [2 * i for i in range(50)]


async def test_images_that_arrive_while_all_instances_are_busy_go_together() -> None:
    machine, seen = Machine(open_=False), Seen()
    scheduler, lane = start(machine, seen=seen)
    tasks = await submit_all(scheduler, lane, range(6))

    machine.gate.set()
    results = await asyncio.gather(*tasks)

    assert machine.batches == [[0], [1, 2, 3, 4, 5]]
    assert [each.batch_size for each in results] == [1, 5, 5, 5, 5, 5]
    assert seen.releases == [("m", "idle", 1), ("m", "idle", 5)]


async def test_all_instances_work_at_the_same_time() -> None:
    machine = Machine(open_=False)
    scheduler, lane = start(machine, instances=3)
    tasks = await submit_all(scheduler, lane, range(5))

    assert sorted(machine.instances) == [0, 1, 2]
    assert scheduler.stats().busy_instances == 3
    assert scheduler.stats().waiting == {"m": 2}

    machine.gate.set()
    await asyncio.gather(*tasks)


async def test_a_cancelled_caller_leaves_its_batch_mates_unharmed() -> None:
    machine, seen = Machine(open_=False), Seen()
    scheduler, lane = start(machine, seen=seen)
    first, *others = await submit_all(scheduler, lane, range(4))

    others[1].cancel()
    await asyncio.wait([others[1]])
    machine.gate.set()
    results = await asyncio.gather(first, others[0], others[2])

    assert [each.result for each in results] == [0, 2, 6]
    assert machine.batches == [[0], [1, 3]]
    assert seen.cancellations == ["queue"]


async def test_a_caller_cancelled_while_its_batch_runs_harms_nobody() -> None:
    machine = Machine(open_=False)
    scheduler, lane = start(machine)
    (running,) = await submit_all(scheduler, lane, [1])
    await machine.started.wait()

    running.cancel()
    await asyncio.wait([running])
    machine.gate.set()

    assert (await scheduler.submit(lane, 5)).result == 10


async def test_a_poisoned_image_fails_alone() -> None:
    machine = Machine(open_=False, bad=frozenset({5}))
    scheduler, lane = start(machine)
    tasks = await submit_all(scheduler, lane, range(9))

    machine.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    failed = [i for i, each in enumerate(results) if isinstance(each, BaseException)]
    assert failed == [5]
    assert isinstance(results[5], ValueError)


async def test_a_batch_that_does_not_fit_is_halved_and_the_size_given_up() -> None:
    machine = Machine(open_=False, memory=2)
    scheduler, lane = start(machine)
    tasks = await submit_all(scheduler, lane, range(9))

    machine.gate.set()
    results = await asyncio.gather(*tasks)

    assert [each.result for each in results] == [2 * i for i in range(9)]
    assert lane.queue.plan.largest <= 2


async def test_a_batch_with_too_few_results_fails_instead_of_mixing_answers_up() -> None:
    async def forgetful(_: int, payloads: Sequence[int]) -> Sequence[int]:
        return list(payloads)[1:]

    scheduler = Scheduler[int, int](1, Seen())
    lane = scheduler.open_lane("m", PLAN, forgetful, 10)

    with pytest.raises(RuntimeError, match="a batch of 1 gave 0 results"):
        await scheduler.submit(lane, 1)


async def test_an_item_whose_deadline_passed_while_it_waited_is_not_run() -> None:
    machine = Machine(open_=False)
    scheduler, lane = start(machine)
    (running,) = await submit_all(scheduler, lane, [1])
    waiting = asyncio.create_task(scheduler.submit(lane, 2, deadline=monotonic()))
    await asyncio.sleep(0)

    machine.gate.set()
    await running

    with pytest.raises(DeadlineExceeded):
        await waiting
    assert machine.batches == [[1]]


async def test_a_full_lane_refuses_at_once_and_says_when_to_come_back() -> None:
    scheduler, lane = start(Machine(), instances=2, capacity=8)

    with (
        scheduler.places(lane, 6),
        pytest.raises(QueueFull, match="PVT_QUEUE_SIZE allows 8") as refused,
        scheduler.places(lane, 3),
    ):
        pass

    assert refused.value.retry_after_seconds == pytest.approx(6 * (1.4 / 8) / 2)
    assert lane.admitted == 0


async def test_with_a_delay_an_idle_instance_waits_for_a_fuller_batch() -> None:
    machine = Machine()
    scheduler = Scheduler[int, int](1, Seen(), max_delay_seconds=0.02)
    lane = scheduler.open_lane("m", PLAN, machine.run, 100)

    await asyncio.gather(*(scheduler.submit(lane, i) for i in range(3)))

    assert machine.batches == [[0, 1, 2]]


async def test_closing_answers_what_it_holds_and_then_refuses() -> None:
    machine = Machine(open_=False)
    scheduler, lane = start(machine)
    tasks = await submit_all(scheduler, lane, range(5))
    machine.gate.set()

    await scheduler.close()

    assert [task.result().result for task in tasks] == [0, 2, 4, 6, 8]
    with pytest.raises(ShuttingDown), scheduler.places(lane, 1):
        pass


async def test_closing_does_not_wait_for_a_batch_that_is_being_held_back() -> None:
    machine = Machine()
    scheduler = Scheduler[int, int](1, Seen(), max_delay_seconds=3600.0)
    lane = scheduler.open_lane("m", PLAN, machine.run, 100)

    (task,) = await submit_all(scheduler, lane, [1])
    async with asyncio.timeout(5):
        await scheduler.close()

    assert (await task).result == 2


async def test_closing_without_waiting_ends_everything_that_is_there() -> None:
    machine = Machine(open_=False)
    scheduler, lane = start(machine)
    tasks = await submit_all(scheduler, lane, range(20))

    async with asyncio.timeout(5):
        await scheduler.close(wait=False)
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(each) for each in results} == {ShuttingDown}


async def test_a_request_larger_than_the_queue_is_refused_for_good() -> None:
    scheduler, lane = start(Machine(), capacity=4)

    with pytest.raises(InvalidRequest, match="5 images in one request; PVT_QUEUE_SIZE allows 4"):
        scheduler.places(lane, 5).__enter__()


async def test_its_repr_tells_what_it_does() -> None:
    scheduler, _ = start(Machine(), instances=2)

    assert repr(scheduler) == "<Scheduler waiting=0 busy=0/2>"
