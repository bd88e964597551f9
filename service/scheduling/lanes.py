"""What is on its way through the scheduler: a model's lane, the places in it, its images and batches, their speed.

A call's stages are `decode` (it waits for a thread, or is decoded), `queue` (it waits for an instance),
`infer` (it is in a batch) and `ended`. It may end at any of them: with a result, an error, or as its caller has gone.
Times are seconds on the caller's clock.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from service.execution.plan import BatchPlan
from service.scheduling.queues import Item, Queue, ReleaseReason

S = TypeVar("S")  # the source: an encoded image
T = TypeVar("T")  # the payload: what decoding makes of it
R = TypeVar("R")  # the result of running it
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

LARGE_MEGAPIXELS = 4.0  # images of more to decode wait in a queue of their own
LEAST_MEASURED = 64  # images, before a speed that was measured while they waited is trusted
_FLOW_SECONDS, _FLOW_BATCHES = 0.5, 4  # or batches of the largest size, after which it is halved
FADE = 0.97  # of what was measured, at each new measurement


class Run(Protocol[T_contra, R_co]):
    """Returns a result for each payload, in order; `alone` in the scheduler, the batch may use every core."""

    def __call__(self, instance: int, payloads: Sequence[T_contra], *, alone: bool) -> Sequence[R_co]: ...  # noqa: D102


@dataclass(eq=False, slots=True)
class Release:
    """A batch that went to an instance, after its oldest image had waited `waited_seconds`.

    `run_seconds` is None while it runs, and covers the second runs of a batch that failed.
    """

    model: str
    reason: ReleaseReason
    size: int
    instance: int
    alone: bool
    waited_seconds: float
    started: float
    run_seconds: float | None = None


@dataclass(slots=True)
class Speed:
    """Seconds per unit of recent work; older measurements fade."""

    seconds: float = 0.0
    units: float = 0.0
    measured: float = 0.0  # units, none faded

    def add(self, seconds: float, units: float) -> None:
        """`units` of work took so many `seconds`."""
        self.seconds = FADE * self.seconds + seconds
        self.units = FADE * self.units + units
        self.measured += units

    def doubt(self, part: float) -> None:
        """Take it to be quicker by this part: what it keeps from being tried can't correct it."""
        self.seconds *= part

    def of(self, units: float) -> float:
        """Seconds that `units` are likely to take; 0 before the first measurement."""
        return units * self.seconds / self.units if self.units else 0.0


@dataclass(frozen=True, slots=True)
class QueueActivity:
    """One lane in images, of which `admitted` counts also those that are about to enter or have just left.

    They wait for a thread to be decoded (`waiting_decode`), are `decoding`, wait for an instance (`queued`), or are in
    a batch (`running`).

    `virtual_seconds` is the instance time it has had, for fairness; `plan` is t(n) in seconds by batch size.
    """

    lane: str
    model: str
    waiting_decode: int
    decoding: int
    queued: int
    running: int
    admitted: int
    capacity: int
    virtual_seconds: float
    plan: dict[int, float]


class QueueDepth(NamedTuple):
    """A model's images by how far they are, as `QueueActivity` says, and how many are admitted at most."""

    waiting_decode: int = 0
    decoding: int = 0
    queued: int = 0
    running: int = 0
    capacity: int = 0


@dataclass(frozen=True, slots=True)
class Activity:
    """The scheduler at the time `now`: its queues, what each instance runs, and the last releases, newest first."""

    now: float
    queues: list[QueueActivity]
    instances: list[Release | None]
    releases: list[Release]

    @property
    def busy(self) -> int:
        """How many instances run a batch."""
        return sum(each is not None for each in self.instances)

    def depths(self) -> dict[str, QueueDepth]:
        """Of each model, in all its lanes."""
        sums: dict[str, QueueDepth] = {}
        for queue in self.queues:
            own = [getattr(queue, name) for name in QueueDepth._fields]
            sums[queue.model] = QueueDepth(*map(sum, zip(sums.get(queue.model, QueueDepth()), own, strict=True)))
        return sums


@dataclass(eq=False)
class Lane(Generic[S, T, R]):
    """One model's way through the scheduler: `decode` makes payloads of sources, `run` results of payloads.

    `capacity` bounds its images, from their admission to their result. `name` is unique; several lanes may share a
    `model`, which metrics go by. `internal`: the service's own work, which metrics and measured speeds leave out.
    """

    name: str
    plan: BatchPlan
    decode: Callable[[S], T]
    run: Run[T, R]
    capacity: int
    model: str = ""
    internal: bool = False
    # Mutable state: the plan; what waits to be decoded, large images apart, and what waits for an instance; how many
    # images are admitted, how many of these are large, for whom, and by request; how long batches take beside their
    # plan, and images while others wait, and when that was measured; how many are being decoded, are in a batch; the
    # batch size that ran out of memory, if one did.
    sources: Queue["Call[S, T, R]"] = field(default_factory=lambda: Queue(None))
    large: Queue["Call[S, T, R]"] = field(default_factory=lambda: Queue(None))
    payloads: Queue["Call[S, T, R]"] = field(init=False)
    admitted: int = 0
    large_admitted: int = 0
    held: dict[str, int] = field(default_factory=dict)
    requests: dict["Places[S, T, R]", None] = field(default_factory=dict)
    pace: Speed = field(default_factory=Speed)
    flow: Speed = field(default_factory=Speed)
    flow_at: float = -inf
    decoding: int = 0
    running: int = 0
    _too_large: int | None = None

    def __post_init__(self) -> None:
        self.model = self.model or self.name
        self.payloads = Queue(self.plan)

    def cap_batch_size(self, size: int) -> None:
        """Never again run `size` images at once."""
        self._too_large = size
        self.replan(self.plan)

    def replan(self, plan: BatchPlan) -> None:
        """Form batches by `plan` from now on, within the cap."""
        self.plan = self.payloads.plan = plan if self._too_large is None else plan.without(self._too_large)

    def seconds(self, images: int) -> float:
        """Seconds of one instance that so many images take."""
        return images * self.plan.image_seconds()

    def flow_known(self, now: float) -> bool:
        """Whether enough images were measured lately; an older speed is halved, as nothing tests what it refuses."""
        if now > self.flow_at + max(_FLOW_SECONDS, _FLOW_BATCHES * self.plan.time(self.plan.largest)):
            self.flow.doubt(0.5)
            self.flow_at = now
        return self.flow.measured >= LEAST_MEASURED

    def run_seconds(self, images: int) -> float:
        """Seconds that a batch is likely to take: what its plan says, at the pace of the last ones."""
        planned = self.plan.time(images)
        return self.pace.of(planned) or planned

    def ahead_of(self, client: str, count: int) -> int:
        """Images that run before all of `count` more of `client` do, as clients and their requests take turns."""
        waiting: dict[str, int] = {}
        own = 0
        for places in self.requests:
            if places.client == client:
                own += min(places.waiting, count)
            else:
                waiting[places.client] = waiting.get(places.client, 0) + places.waiting
        return own + sum(min(images, own + count) for images in waiting.values())

    def ahead(self) -> int:
        """Images that are admitted and in no batch yet."""
        return max(0, self.admitted - self.running)  # a caller that has gone frees its place before its batch ends

    def activity(self) -> QueueActivity:
        """The state of the lane."""
        return QueueActivity(
            lane=self.name,
            model=self.model,
            waiting_decode=len(self.sources.waiting) + len(self.large.waiting),
            decoding=self.decoding,
            queued=len(self.payloads.waiting),
            running=self.running,
            admitted=self.admitted,
            capacity=self.capacity,
            virtual_seconds=self.payloads.virtual_time,
            plan=dict(self.plan.seconds),
        )


@dataclass(eq=False, slots=True)
class Places(Generic[S, T, R]):
    """What a request holds of its lane: places for so many images, of which so many are large.

    `waiting` of them have not ended and are in no batch yet.
    """

    lane: Lane[S, T, R]
    client: str
    # Mutable state.
    images: int
    large: int
    waiting: int


@dataclass(eq=False, slots=True)
class Call(Item, Generic[S, T, R]):
    """One image on its way, which waits in the queues.

    As a job: call `lane.decode(source)`, then `Dispatcher.decoded`.
    """

    lane: Lane[S, T, R]
    source: S
    megapixels: float = 0.0
    # Mutable state: how far it is, how long it waited for a thread, and what decoding made of it, took, and was
    # expected to take.
    deadline: float = inf
    stage: Literal["decode", "queue", "infer", "ended"] = "decode"
    payload: T | None = None
    wait_seconds: float = 0.0
    decode_seconds: float = 0.0
    charged: float = 0.0

    @property
    def large(self) -> bool:
        """Whether it waits among the large ones."""
        return self.megapixels > LARGE_MEGAPIXELS


@dataclass(frozen=True, slots=True)
class Completed(Generic[R]):
    """A result; the seconds it waited for a thread, was decoded, queued, and in its batch; that batch's size.

    `reason`: why the batch was released when it was; `began`: when it did.
    """

    result: R
    wait_seconds: float
    decode_seconds: float
    queue_seconds: float
    run_seconds: float
    batch_size: int
    reason: ReleaseReason
    began: float


Outcome = Completed[R] | Exception
Ended = list[tuple[Call[S, T, R], Outcome[R]]]


@dataclass(eq=False, slots=True)
class Running(Generic[S, T, R]):
    """A job: run `part` on `release.instance`, then call `Dispatcher.ran`; repeat until no part is left."""

    lane: Lane[S, T, R]
    release: Release
    # Mutable state: what is to run now, since when, and what is left of a batch that failed and was halved.
    part: list[Call[S, T, R]]
    started: float
    rest: deque[list[Call[S, T, R]]] = field(default_factory=deque)

    def payloads(self) -> list[T]:
        """What `lane.run` takes."""
        return [call.payload for call in self.part]  # type: ignore[misc]  # what runs has been decoded


Job = Call[S, T, R] | Running[S, T, R]
