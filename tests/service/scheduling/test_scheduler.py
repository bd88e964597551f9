import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest

from service.errors import DeadlineExceeded, OutOfMemory, QueueFull, ShuttingDown
from service.execution.plan import BatchPlan
from service.scheduling.lanes import Completed, Lane
from service.scheduling.scheduler import Scheduler
from tests.service.scheduling.simulation import Seen

PLAN = BatchPlan({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4})
BOUND = 10.0  # seconds after which a wait has failed; none is meant to take long


class Count:
    """A number that threads raise and tests wait for."""

    def __init__(self) -> None:
        self.value = 0
        self._changed = threading.Condition()

    def up(self) -> None:
        with self._changed:
            self.value += 1
            self._changed.notify_all()

    async def reaches(self, value: int) -> None:
        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: self.value >= value, BOUND)

        assert await asyncio.to_thread(wait), f"{self.value} of {value}"


class Machine:
    """Instances that work only while the gate is open, and double what they get; `bad` payloads fail."""

    def __init__(self, *, open_: bool = True, bad: frozenset[int] = frozenset(), memory: int = 100) -> None:
        self.gate = threading.Event()
        self.started = Count()
        self.batches: list[list[int]] = []
        self.instances: list[int] = []
        self.alone: list[bool] = []
        self._bad, self._memory = bad, memory
        if open_:
            self.gate.set()

    def run(self, instance: int, payloads: Sequence[int], *, alone: bool) -> Sequence[int]:
        self.batches.append(list(payloads))
        self.instances.append(instance)
        self.alone.append(alone)
        self.started.up()
        assert self.gate.wait(BOUND)
        if len(payloads) > self._memory:
            raise OutOfMemory("too many")
        if poison := self._bad.intersection(payloads):
            raise ValueError(f"poisoned by {sorted(poison)}")
        return [2 * each for each in payloads]


class Bench:
    """A scheduler with one lane on `machine`; `decoded` counts images that have reached the queue."""

    def __init__(
        self,
        machine: Machine,
        *,
        instances: int = 1,
        capacity: int = 100,
        decode: Callable[[int], int] = int,
        **options: Any,
    ) -> None:
        self.seen = Seen()
        self.scheduler = Scheduler[int, int, int](instances, self.seen, **options)
        self.lane: Lane[int, int, int] = self.scheduler.open_lane(Lane("m", PLAN, decode, machine.run, capacity))
        self.decoded = Count()
        dispatcher = self.scheduler._dispatcher
        report = dispatcher.decoded

        def decoded(*args: Any) -> None:
            report(*args)
            self.decoded.up()

        setattr(dispatcher, "decoded", decoded)  # noqa: B010  the type checker knows no methods that change

    async def submit(self, payload: int, **options: float) -> Completed[int]:
        with self.scheduler.reserve(self.lane, 1) as places:
            return await self.scheduler.submit(places, payload, **options)

    async def submit_all(self, payloads: Sequence[int]) -> list[asyncio.Task[Completed[int]]]:
        """Tasks whose images have been decoded; what an idle instance could take runs, the others wait."""
        before = self.decoded.value
        tasks = [asyncio.create_task(self.submit(each)) for each in payloads]
        await self.decoded.reaches(before + len(payloads))
        return tasks


@asynccontextmanager
async def bench(machine: Machine, **options: Any) -> AsyncIterator[Bench]:
    made = Bench(machine, **options)
    try:
        yield made
    finally:
        machine.gate.set()
        async with asyncio.timeout(BOUND):
            await made.scheduler.close()


async def busy(made: Bench, machine: Machine) -> asyncio.Task[Completed[int]]:
    """The one instance runs the image 0."""
    (task,) = await made.submit_all([0])
    await machine.started.reaches(1)
    return task


async def test_each_caller_gets_its_own_result() -> None:
    async with bench(Machine(), instances=2, decoders=2) as made:
        results = await asyncio.gather(*(made.submit(i) for i in range(50)))

    assert [each.result for each in results] == [2 * i for i in range(50)]


async def test_images_that_arrive_while_all_instances_are_busy_go_together() -> None:
    machine = Machine(open_=False)
    async with bench(machine) as made:
        first = await busy(made, machine)
        tasks = await made.submit_all(range(1, 6))
        machine.gate.set()
        results = await asyncio.gather(first, *tasks)

    assert machine.batches == [[0], [1, 2, 3, 4, 5]]
    assert [each.batch_size for each in results] == [1, 5, 5, 5, 5, 5]
    assert made.seen.releases == [("m", "idle", 1), ("m", "idle", 5)]


async def test_all_instances_work_at_the_same_time() -> None:
    machine = Machine(open_=False)
    async with bench(machine, instances=3) as made:
        tasks = await made.submit_all(range(5))
        await machine.started.reaches(3)

        assert sorted(machine.instances) == [0, 1, 2]
        activity = made.scheduler.activity()
        assert sum(each is not None for each in activity.instances) == len(activity.instances) == 3
        assert [queue.queued for queue in activity.queues] == [2]
        machine.gate.set()
        await asyncio.gather(*tasks)


async def test_decoding_goes_on_while_all_instances_are_busy() -> None:
    machine = Machine(open_=False)
    async with bench(machine, decoders=2) as made:
        await busy(made, machine)
        await made.submit_all(range(4))

        assert [queue.queued for queue in made.scheduler.activity().queues] == [4]


async def test_only_an_image_with_nobody_beside_it_runs_alone() -> None:
    machine = Machine()
    async with bench(machine, instances=2) as made:
        await made.submit(1)
        machine.gate.clear()
        tasks = await made.submit_all([2, 3])
        machine.gate.set()
        await asyncio.gather(*tasks)
        await made.submit(4)

    assert machine.alone[0]
    assert not all(machine.alone[1:3])
    assert machine.alone[3]


async def test_a_cancelled_caller_leaves_its_batch_mates_unharmed() -> None:
    machine = Machine(open_=False)
    async with bench(machine) as made:
        first = await busy(made, machine)
        others = await made.submit_all(range(1, 4))
        others[1].cancel()
        await asyncio.wait([others[1]])
        machine.gate.set()
        results = await asyncio.gather(first, others[0], others[2])

    assert [each.result for each in results] == [0, 2, 6]
    assert machine.batches == [[0], [1, 3]]
    assert made.seen.stages == ["queue"]
    assert made.lane.admitted == 0


async def test_a_caller_cancelled_while_its_batch_runs_harms_nobody() -> None:
    machine = Machine(open_=False)
    async with bench(machine) as made:
        running = await busy(made, machine)
        running.cancel()
        await asyncio.wait([running])
        machine.gate.set()

        assert (await made.submit(5)).result == 10
        assert made.seen.stages == ["infer"]


async def test_a_caller_cancelled_while_its_image_is_decoded_is_not_run() -> None:
    machine, decoding, release = Machine(), Count(), threading.Event()

    def decode(source: int) -> int:
        decoding.up()
        assert release.wait(BOUND)
        return source

    async with bench(machine, decode=decode) as made:
        task = asyncio.create_task(made.submit(1))
        await decoding.reaches(1)
        task.cancel()
        await asyncio.wait([task])
        release.set()
        await made.submit(2)

    assert machine.batches == [[2]]
    assert made.seen.stages == ["decode"]


async def test_a_poisoned_image_fails_alone() -> None:
    machine = Machine(open_=False, bad=frozenset({5}))
    async with bench(machine) as made:
        first = await busy(made, machine)
        tasks = await made.submit_all(range(1, 9))
        machine.gate.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)

    failed = [i for i, each in enumerate(results) if isinstance(each, BaseException)]
    assert failed == [5]
    assert isinstance(results[5], ValueError)


async def test_an_image_that_can_not_be_decoded_fails_alone() -> None:
    def decode(source: int) -> int:
        if source == 2:
            raise ValueError("no image")
        return source

    async with bench(Machine(), decode=decode) as made:
        results = await asyncio.gather(*(made.submit(i) for i in range(4)), return_exceptions=True)

    assert [isinstance(each, ValueError) for each in results] == [False, False, True, False]


async def test_a_batch_that_does_not_fit_is_halved_and_the_size_given_up() -> None:
    machine = Machine(open_=False, memory=2)
    async with bench(machine) as made:
        first = await busy(made, machine)
        tasks = await made.submit_all(range(1, 9))
        machine.gate.set()
        results = await asyncio.gather(first, *tasks)

    assert [each.result for each in results] == [2 * i for i in range(9)]
    assert made.lane.plan.largest <= 2


async def test_a_thread_survives_whatever_its_job_raises() -> None:
    class Panic(BaseException):
        pass

    def decode(source: int) -> int:
        if source == 1:
            raise Panic("out of an extension")
        return source

    async with bench(Machine(), decode=decode) as made:
        with pytest.raises(RuntimeError, match="Panic: out of an extension"):
            await made.submit(1)

        assert (await made.submit(2)).result == 4


async def test_an_item_whose_deadline_passed_while_it_waited_is_not_run() -> None:
    machine = Machine(open_=False)
    async with bench(machine) as made:
        first = await busy(made, machine)
        waiting = asyncio.create_task(made.submit(2, deadline=monotonic()))

        with pytest.raises(DeadlineExceeded):
            await waiting
        machine.gate.set()
        await first

    assert machine.batches == [[0]]


async def test_a_hopeless_deadline_is_refused_before_anything_is_done_and_counted() -> None:
    machine = Machine(open_=False)
    async with bench(machine) as made:
        await busy(made, machine)
        await made.submit_all(range(20))
        decoded = made.decoded.value

        with pytest.raises(DeadlineExceeded, match="wait for 'm' already"):
            made.scheduler.reserve(made.lane, 2, deadline=monotonic() + 0.5).__enter__()

        assert made.seen.stages == ["admission", "admission"]
        assert made.decoded.value == decoded


async def test_a_full_lane_refuses_at_once_and_its_places_come_back() -> None:
    async with bench(Machine(), capacity=8) as made:
        scheduler, lane = made.scheduler, made.lane
        with scheduler.reserve(lane, 6), pytest.raises(QueueFull), scheduler.reserve(lane, 3):
            pass

        assert lane.admitted == 0


async def test_a_refusal_is_known_before_anything_is_reserved() -> None:
    async with bench(Machine(), capacity=8) as made:
        scheduler, lane = made.scheduler, made.lane
        with scheduler.reserve(lane, 8, client="a"):
            assert isinstance(scheduler.refusal(lane, client="a"), QueueFull)
            assert scheduler.refusal(lane, client="b") is None  # it has a claim to one of a's places

        assert scheduler.refusal(lane, client="a") is None


async def test_with_a_delay_an_idle_instance_waits_for_a_fuller_batch() -> None:
    machine = Machine()
    async with bench(machine, max_delay_seconds=3600.0) as made:
        await asyncio.gather(*(made.submit(i) for i in range(8)))

    assert machine.batches == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert made.seen.releases == [("m", "full", 8)]


async def test_with_a_delay_a_batch_goes_when_it_has_passed() -> None:
    machine = Machine()
    async with bench(machine, max_delay_seconds=0.001) as made:
        assert (await made.submit(1)).result == 2

    assert made.seen.releases == [("m", "delay", 1)]


async def test_closing_answers_what_it_holds_and_then_refuses() -> None:
    machine = Machine(open_=False)
    async with bench(machine) as made:
        first = await busy(made, machine)
        tasks = await made.submit_all(range(1, 5))
        machine.gate.set()
        await made.scheduler.close()

        assert [(await task).result for task in (first, *tasks)] == [0, 2, 4, 6, 8]
        with pytest.raises(ShuttingDown), made.scheduler.reserve(made.lane, 1):
            pass


async def test_closing_ends_its_threads() -> None:
    async with bench(Machine(), instances=2, decoders=3) as made:
        await made.submit(1)
        threads = [each for each in threading.enumerate() if each.name.startswith("pvt-work")]
        assert len(threads) >= 5

        await made.scheduler.close()

        assert not any(each.is_alive() for each in made.scheduler._threads)


async def test_closing_does_not_wait_for_a_batch_that_is_being_held_back() -> None:
    async with bench(Machine(), max_delay_seconds=3600.0) as made:
        (task,) = await made.submit_all([1])
        async with asyncio.timeout(BOUND):
            await made.scheduler.close()

        assert (await task).result == 2


async def test_closing_without_waiting_ends_everything_that_is_there() -> None:
    machine = Machine(open_=False)
    async with bench(machine) as made:
        tasks = await made.submit_all(range(20))
        async with asyncio.timeout(BOUND):
            await made.scheduler.close(wait=False)
            results = await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(each) for each in results} == {ShuttingDown}
    assert made.lane.admitted == 0


async def test_what_it_does_can_be_looked_at() -> None:
    machine = Machine(open_=False)
    async with bench(machine) as made:
        await busy(made, machine)

        assert [each is not None for each in made.scheduler.activity().instances] == [True]
        stalled = made.scheduler.stalled_seconds()
        assert (stalled["decode"], stalled["infer"] > 0) == (0.0, True)
        assert repr(made.scheduler) == "<Scheduler <Dispatcher to_decode=0 decoding=0/1 waiting=0 busy=1/1>>"


async def test_a_closed_lane_is_waited_for_until_no_thread_uses_it() -> None:
    go, running = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def run(instance: int, payloads: Sequence[int], *, alone: bool) -> Sequence[int]:  # noqa: ARG001
        loop.call_soon_threadsafe(running.set)
        go.wait(30)
        return payloads

    scheduler = Scheduler[int, int, int](1, Seen())
    lane = scheduler.open_lane(Lane("a", BatchPlan({1: 0.01}), lambda x: x, run, 8))
    with scheduler.reserve(lane, 1) as places:
        caller = asyncio.create_task(scheduler.submit(places, 1))
        await running.wait()
        with pytest.raises(RuntimeError, match="still holds 1 images"):
            await scheduler.close_lane(lane)
        caller.cancel()
        await asyncio.wait([caller])
    closing = asyncio.create_task(scheduler.close_lane(lane))
    await asyncio.sleep(0)

    assert not closing.done()
    go.set()
    await closing
    assert scheduler.activity().queues == []
    await scheduler.close()


async def test_a_closed_lane_is_waited_for_until_threads_hold_nothing_of_its_last_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A result is with its caller before the thread that made it has let go of the job."""
    go = threading.Event()
    hand_over = Scheduler._hand_over

    def slow(scheduler: Any, loop: Any, ended: list[Any]) -> None:
        hand_over(scheduler, loop, ended)
        assert not ended or go.wait(BOUND)

    monkeypatch.setattr(Scheduler, "_hand_over", slow)
    scheduler = Scheduler[int, int, int](1, Seen())
    lane = scheduler.open_lane(Lane("a", PLAN, int, Machine().run, 8))
    with scheduler.reserve(lane, 1) as places:
        assert (await scheduler.submit(places, 1)).result == 2
    closing = asyncio.create_task(scheduler.close_lane(lane))
    await asyncio.sleep(0)

    assert not closing.done()
    go.set()
    async with asyncio.timeout(BOUND):
        await closing
    await scheduler.close()


class Body:
    """An image that can be watched."""


@pytest.mark.parametrize("outcome", ["result", "bad image", "bad batch", "caller gone"])
async def test_nothing_holds_an_image_once_its_call_has_ended(outcome: str) -> None:
    """With garbage collection off: no cycle of references leads to it."""
    running, go = Count(), threading.Event()

    def decode(body: Body) -> list[Body]:
        if outcome == "bad image":
            raise ValueError("no image")
        return [body]

    def run(instance: int, payloads: Sequence[list[Body]], *, alone: bool) -> Sequence[int]:  # noqa: ARG001
        running.up()
        assert go.wait(BOUND)
        if outcome == "bad batch":
            raise ValueError("poisoned")
        return [len(each) for each in payloads]

    async def call(scheduler: Scheduler[Body, list[Body], int], lane: Lane[Body, list[Body], int]) -> weakref.ref[Body]:
        body = Body()
        with scheduler.reserve(lane, 1) as places:
            task = asyncio.create_task(scheduler.submit(places, body))
            if outcome == "caller gone":
                await running.reaches(1)
                task.cancel()
            else:
                go.set()
            await asyncio.wait([task])
            assert task.cancelled() == (outcome == "caller gone")
            assert task.cancelled() or (task.exception() is None) == (outcome == "result")
        return weakref.ref(body)

    scheduler = Scheduler[Body, list[Body], int](1, Seen())
    lane = scheduler.open_lane(Lane("m", PLAN, decode, run, 8))
    gc.collect()
    gc.disable()
    try:
        reference = await call(scheduler, lane)
        go.set()
        await scheduler.close()  # its threads have done
        assert reference() is None
    finally:
        gc.enable()
