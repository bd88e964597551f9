"""A machine in simulated time: the dispatcher with jobs that take what its plans say, and not a real second."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

from prometheus_client import CollectorRegistry

from service.execution.plan import BatchPlan
from service.metrics import EngineMetrics
from service.scheduling.dispatcher import Dispatcher
from service.scheduling.lanes import LARGE_MEGAPIXELS, Call, Lane, Outcome, Places, Running


class Seen(EngineMetrics):
    """Metrics that remember what was counted."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        self.releases: list[tuple[str, str, int]] = []
        self.stages: list[str] = []

    def batch_released(self, model: str, reason: str, size: int) -> None:
        self.releases.append((model, reason, size))

    def cancelled(self, stage: str) -> None:
        self.stages.append(stage)


def double(instance: int, payloads: Sequence[int], *, alone: bool) -> Sequence[int]:  # noqa: ARG001
    """A model that knows neither batches nor instances."""
    return [2 * each for each in payloads]


def places_of(call: Call[int, int, int]) -> Places[int, int, int]:
    assert isinstance(call.request, Places)
    return call.request


def make_lane(name: str, plan: BatchPlan, capacity: int = 10_000) -> Lane[int, int, int]:
    return Lane(name, plan, lambda source: source, double, capacity)


@dataclass(eq=False)
class Sent:
    """An image that was sent at a time, and when and how it ended."""

    at: float
    ended: float = inf
    outcome: Outcome[int] | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.at


@dataclass
class Simulation:
    """`speed`: how much faster runs are than the plan says. A call holds its place until it ends."""

    instances: int
    decoders: int = 1
    decode_seconds: float = 0.0
    speed: float = 1.0
    now: float = 0.0
    lanes: list[Lane[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dispatcher = Dispatcher[int, int, int](self.instances, self.decoders, Seen())
        self._events: list[tuple[float, int, Call[int, int, int] | Running[int, int, int]]] = []
        self._turn = count()
        self._sent: dict[Call[int, int, int], Sent] = {}

    def lane(self, name: str, plan: BatchPlan, capacity: int = 10_000) -> Lane[int, int, int]:
        made = make_lane(name, plan, capacity)
        self.dispatcher.lanes.append(made)
        return made

    def send(
        self,
        lane: Lane[int, int, int],
        images: int = 1,
        deadline: float = inf,
        client: str = "",
        megapixels: float = 0.0,
    ) -> list[Sent]:
        """Raises what admission raises; large images take `decode_seconds` for each megapixel."""
        large = images if megapixels > LARGE_MEGAPIXELS else 0
        places = self.dispatcher.admit(lane, images, self.now, deadline, client, large)
        sent = [Sent(self.now) for _ in range(images)]
        for each in sent:
            call = Call(lane, 1, megapixels)
            self._sent[call] = each
            self.dispatcher.add(call, self.now, deadline, places)
        self._begin()
        return sent

    def run(self, until: float = inf) -> None:
        """Go on until then, or until nothing is left."""
        while self._events and self._events[0][0] <= until:
            self.now, _, job = heapq.heappop(self._events)
            if isinstance(job, Call):
                self.dispatcher.decoded(job, job.source, self.now)
            else:
                self.dispatcher.ran(job, double(0, job.payloads(), alone=False), self.now)
            self._begin()
        if until < inf:
            self.now = until

    def _settle(self) -> None:
        for call, outcome in self.dispatcher.take_ended():
            sent = self._sent.pop(call)
            sent.ended, sent.outcome = self.now, outcome
            if places_of(call).images:  # unless it was pushed out, which took its place
                self.dispatcher.release(places_of(call), 1, int(call.large))

    def _begin(self) -> None:
        self._settle()
        while isinstance(job := self.dispatcher.next_job(self.now), Call | Running):
            if isinstance(job, Call):
                seconds = self.decode_seconds * (job.megapixels if job.large else 1.0)
            else:
                seconds = job.lane.plan.time(len(job.part)) / self.speed
            heapq.heappush(self._events, (self.now + seconds, next(self._turn), job))
            self._settle()
        self._settle()
