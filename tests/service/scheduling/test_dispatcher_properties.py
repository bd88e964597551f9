"""Whatever comes, in whatever order: the promises of the scheduler, by a machine that hypothesis drives."""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from service.errors import DeadlineExceeded, InvalidRequest, OutOfMemory, QueueFull
from service.execution.plan import BatchPlan
from service.scheduling.dispatcher import LARGE_PLACES, Dispatcher
from service.scheduling.lanes import LARGE_MEGAPIXELS, Call, Completed, Lane, Outcome, Places, Running
from tests.service.scheduling.simulation import Seen, make_lane

PLANS = st.builds(
    lambda sizes, step: BatchPlan({n: 1.0 + step * (n - 1) for n in sizes | {1}}),
    st.sets(st.sampled_from([2, 3, 4, 8])),
    st.floats(0.0, 1.2),
)
FATES = st.sampled_from(["good", "good", "good", "undecodable", "poisoned"])


@dataclass(eq=False)
class TrackedImage:
    """What is known of one call from outside."""

    call: Call[Any, Any, Any]
    request: "Request"
    fate: str
    deadline: float
    outcomes: list[Outcome[Any]] = field(default_factory=list)
    gone: bool = False
    decodes: int = 0
    runs: int = 0

    @property
    def over(self) -> bool:
        return self.gone or bool(self.outcomes)


@dataclass(eq=False)
class Request:
    """A client's request, and what it holds."""

    lane: Lane[Any, Any, Any]
    places: Places[Any, Any, Any]
    images: list[TrackedImage] = field(default_factory=list)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, callers go, jobs end, in any order; whatever changes, the dispatcher is asked for jobs."""

    images = Bundle("images")

    @initialize(
        instances=st.integers(1, 3),
        decoders=st.integers(1, 3),
        plans=st.lists(PLANS, min_size=1, max_size=3),
        capacity=st.integers(1, 12),
        memory=st.integers(1, 8),
    )
    def begin(self, instances: int, decoders: int, plans: list[BatchPlan], capacity: int, memory: int) -> None:
        self.now = 0.0
        self.instances, self.decoders, self.memory = instances, decoders, memory
        self.seen = Seen()
        self.dispatcher = Dispatcher[Any, Any, Any](instances, decoders, self.seen)
        self.lanes = [make_lane(str(i), plan, capacity) for i, plan in enumerate(plans)]
        self.dispatcher.lanes.extend(self.lanes)
        self.longest = max(plan.time(size) for plan in plans for size in plan.sizes)
        self.open: list[Request] = []
        self.decoding: list[Call[Any, Any, Any]] = []
        self.running: dict[int, Running[Any, Any, Any]] = {}
        self.decoded: dict[Any, list[TrackedImage]] = {lane: [] for lane in self.lanes}

    @rule(
        target=images,
        which=st.integers(0, 2),
        fates=st.lists(FATES, min_size=1, max_size=6),
        allowed=st.floats(0.1, 20.0) | st.just(inf),
        client=st.sampled_from("abc"),
        large=st.integers(0, 6),
    )
    def request(self, which: int, fates: list[str], allowed: float, client: str, large: int) -> Any:
        lane, deadline = self.lanes[which % len(self.lanes)], self.now + allowed
        before, idle, large = lane.admitted, not self.dispatcher.admitted, min(large, len(fates))
        try:
            places = self.dispatcher.admit(lane, len(fates), self.now, deadline, client, large)
        except InvalidRequest:
            assert len(fates) > lane.capacity
            return multiple()
        except QueueFull:
            assert before + len(fates) > lane.capacity or lane.large_admitted + large > lane.capacity // LARGE_PLACES
            self.changed()
            return multiple()
        except DeadlineExceeded:
            assert not idle
            return multiple()
        made = Request(lane, places)
        for i, fate in enumerate(fates):
            call = Call[Any, Any, Any](lane, None, LARGE_MEGAPIXELS + 1 if i < large else 0.1)
            image = TrackedImage(call, made, fate, deadline)
            call.source = image
            made.images.append(image)
            self.dispatcher.add(call, self.now, deadline, places)
        self.open.append(made)
        self.changed()
        return multiple(*made.images)

    @rule(image=consumes(images))
    def caller_goes(self, image: TrackedImage) -> None:
        counted = len(self.seen.stages)
        if image.over:
            self.dispatcher.abandon(image.call)
            assert len(self.seen.stages) == counted
            return
        self.dispatcher.abandon(image.call)
        assert len(self.seen.stages) == counted + 1
        image.gone = True
        self.changed()

    @rule(seconds=st.floats(0.01, 5.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.changed()

    @rule(data=st.data())
    def a_job_ends(self, data: st.DataObject) -> None:
        jobs: list[Call[Any, Any, Any] | Running[Any, Any, Any]] = [*self.decoding, *self.running.values()]
        if jobs:
            self.end(jobs[data.draw(st.integers(0, len(jobs) - 1))])

    def end(self, job: Any) -> None:
        if isinstance(job, Call):
            self.decoding.remove(job)
            image = job.source
            bad = image.fate == "undecodable"
            if not bad and not image.over:
                self.decoded[job.lane].append(image)
            self.dispatcher.decoded(job, ValueError("undecodable") if bad else image, self.now)
        else:
            self.dispatcher.ran(job, self.results(job), self.now)
            if job.part:
                self.note_run(job)
            else:
                del self.running[job.release.instance]
        self.changed()

    def results(self, job: Running[Any, Any, Any]) -> Any:
        part = job.payloads()
        if len(part) > self.memory:
            return OutOfMemory("too many")
        if any(image.fate == "poisoned" for image in part):
            return ValueError("poisoned")
        return part

    def note_run(self, job: Running[Any, Any, Any]) -> None:
        for call in job.part:
            assert not call.source.over, "ended or abandoned work was executed"
            call.source.runs += 1

    def changed(self) -> None:
        """What the threads do: take every job there is, and settle what ended."""
        while isinstance(job := self.dispatcher.next_job(self.now), Call | Running):
            if isinstance(job, Call):
                self.begin_decoding(job)
            else:
                self.begin_running(job)
        assert job is None, "without a delay nothing is held back"
        self.settle()

    def begin_decoding(self, job: Call[Any, Any, Any]) -> None:
        image = job.source
        assert not image.over, "ended or abandoned work was decoded"
        assert image.deadline > self.now
        image.decodes += 1
        assert image.decodes == 1
        self.decoding.append(job)
        assert len(self.decoding) <= max(2, self.decoders)
        assert sum(each.large for each in self.decoding) <= max(1, self.decoders // 2)

    def begin_running(self, job: Running[Any, Any, Any]) -> None:
        instance, lane = job.release.instance, job.lane
        assert instance not in self.running
        assert 0 <= instance < self.instances
        assert 1 <= len(job.part) <= lane.plan.largest
        there = [image for request in self.open for image in request.images if not image.over]
        assert job.release.alone <= (len(there) == 1 and not self.running and not self.decoding)
        # Within a request images run in the order in which they were decoded; those that ended meanwhile are left out.
        for request in {call.source.request for call in job.part}:
            queue = [each for each in self.decoded[lane] if each.request is request and not each.over and not each.runs]
            part = [call.source for call in job.part if call.source.request is request]
            assert part == queue[: len(part)]
        assert all(call.source.deadline > self.now for call in job.part)
        self.running[instance] = job
        self.note_run(job)

    def settle(self) -> None:
        for call, outcome in self.dispatcher.take_ended():
            image = call.source
            assert not image.over, "ended twice, or after its caller had gone"
            image.outcomes.append(outcome)
        for request in [request for request in self.open if all(image.over for image in request.images)]:
            self.open.remove(request)
            self.dispatcher.release(request.places)

    @invariant()
    def no_slot_is_idle_while_its_work_waits(self) -> None:
        waiting = sum(len(lane.payloads.waiting) for lane in self.lanes)
        small = sum(len(lane.sources.waiting) for lane in self.lanes)
        large = sum(len(lane.large.waiting) for lane in self.lanes)
        slow = sum(call.large for call in self.decoding)
        assert len(self.running) == self.instances or not waiting
        assert len(self.decoding) - slow >= max(1, self.decoders - slow) or not small
        assert slow == max(1, self.decoders // 2) or len(self.decoding) == self.decoders or not large
        assert not self.dispatcher.has_work()

    @invariant()
    def places_are_bounded_and_given_back(self) -> None:
        for lane in self.lanes:
            places = [request.places for request in self.open if request.lane is lane]
            assert lane.admitted == sum(each.images for each in places) == sum(lane.held.values()) <= lane.capacity
            assert lane.large_admitted == sum(each.large for each in places)
            for request in (each for each in self.open if each.lane is lane):
                pushed = sum(isinstance(end, QueueFull) for image in request.images for end in image.outcomes)
                assert request.places.images == len(request.images) - pushed
            assert {*lane.requests} == {each for each in places if each.images}

    @invariant()
    def no_waiting_model_is_ahead_of_another_by_more_than_a_batch(self) -> None:
        waiting = [lane.payloads.virtual_time for lane in self.lanes if lane.payloads.waiting]
        assert not waiting or max(waiting) - min(waiting) <= self.longest + 1e-9

    @invariant()
    def each_outcome_is_its_images_own(self) -> None:
        for request in self.open:
            for image in request.images:
                check(image)

    def teardown(self) -> None:
        if not hasattr(self, "lanes"):
            return
        requests = [*self.open]
        while self.decoding or self.running:
            self.now += 0.01
            self.end(next(iter([*self.decoding, *self.running.values()])))

        for request in requests:
            for image in request.images:
                check(image)
                assert image.gone != (len(image.outcomes) == 1)
        assert not self.open
        assert not any(self.dispatcher.activity(self.now).instances)
        assert all(lane.admitted == lane.running == lane.decoding == 0 for lane in self.lanes)


def check(image: TrackedImage) -> None:
    for outcome in image.outcomes:
        match outcome:
            case Completed():
                assert image.fate == "good"
                assert outcome.result is image
            case DeadlineExceeded():
                assert image.deadline < inf
                assert image.runs == 0
            case QueueFull():
                assert image.runs == 0
            case ValueError():
                assert str(outcome) == image.fate
            case OutOfMemory():
                raise AssertionError("an image alone always fits")
            case _:
                raise AssertionError(outcome)


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, phases=[Phase.generate]
)
test_the_scheduler_keeps_its_promises = SchedulerMachine.TestCase
