"""A model's lane through the scheduler, and what travels on it: calls, and the jobs that move them on."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from service.execution.plan import BatchPlan
from service.scheduling.activity import Release
from service.scheduling.queues import Item, Queue

S = TypeVar("S")  # what comes in: an encoded picture
T = TypeVar("T")  # what decoding makes of it
R = TypeVar("R")  # what running it gives
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

Stage = Literal["decode", "queue", "infer", "ended"]


class Run(Protocol[T_contra, R_co]):
    """Runs one batch on the numbered instance; gives as many results as it got payloads, in their order.

    `alone`: nothing else is in the scheduler, so that the batch may use every core.
    """

    def __call__(self, instance: int, payloads: Sequence[T_contra], *, alone: bool) -> Sequence[R_co]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Completed(Generic[R]):
    """A result and what it took: seconds until it was decoded, in the queue, in its batch; that batch's size."""

    result: R
    decode_seconds: float
    queue_seconds: float
    run_seconds: float
    batch_size: int


class OneByOne:
    """The plan of a queue for decoding: no batches, and each picture is charged when it is known what it took."""

    largest = 1

    def time(self, _: int) -> float:
        """Nothing in advance."""
        return 0.0

    def best(self, _: int) -> int:
        """One."""
        return 1


class Lane(Generic[S, T, R]):
    """One model's way through the scheduler: `decode` makes payloads of sources, `run` results of payloads.

    `capacity` bounds the images it holds, from their admission to their answer. `name` tells it from others, `model` is
    what several may share, for metrics.
    """

    def __init__(
        self, name: str, plan: BatchPlan, decode: Callable[[S], T], run: Run[T, R], capacity: int, *, model: str = ""
    ) -> None:
        self.name = name
        self.model = model or name
        self.decode = decode
        self.run = run
        self.capacity = capacity
        # Mutable state: the batch plan, and the batch size from which on memory ran out, if it did; what waits to be
        # decoded and what waits for an instance; how many images have a place, are being decoded, are in a batch.
        self.plan = plan
        self._given_up: int | None = None
        self.sources = Queue["Call[S, T, R]"](name, OneByOne())
        self.payloads = Queue["Call[S, T, R]"](name, plan)
        self.admitted = 0
        self.decoding = 0
        self.running = 0

    @property
    def at_work(self) -> bool:
        """Whether threads are busy for it, be it for callers that have gone."""
        return self.decoding > 0 or self.running > 0

    def give_up(self, size: int) -> None:
        """Never again run `size` images at once."""
        self._given_up = size
        self.replan(self.plan)

    def replan(self, plan: BatchPlan) -> None:
        """Batches go by `plan` from now on, but for what was given up."""
        self.plan = self.payloads.plan = plan if self._given_up is None else plan.without(self._given_up)

    def seconds(self, images: int) -> float:
        """Seconds of one instance that so many images take."""
        return images * self.plan.image_seconds()

    def ahead(self) -> int:
        """Images that have a place and are in no batch yet."""
        return max(0, self.admitted - self.running)  # a caller that went gives its place back before its batch ends


@dataclass(eq=False, slots=True)
class Call(Generic[S, T, R]):
    """One image on its way; `end` is what the scheduler's user wants done with its outcome."""

    lane: Lane[S, T, R]
    source: S
    end: "Callable[[Outcome[R]], None]"
    # Mutable state: how far it is, its present place in a queue, and what decoding gave and took.
    stage: Stage = "decode"
    item: "Item[Call[S, T, R]] | None" = None
    payload: T | None = None
    decode_seconds: float = 0.0


@dataclass(eq=False, slots=True)
class Decoding(Generic[S, T, R]):
    """A job: call `lane.decode(source)`, tell `Dispatcher.decoded`."""

    call: Call[S, T, R]
    started: float


@dataclass(eq=False, slots=True)
class Running(Generic[S, T, R]):
    """A job: run `part` on `release.instance`, tell `Dispatcher.ran`; again, until no part is left."""

    lane: Lane[S, T, R]
    release: Release
    # Mutable state: what is to run now, since when, and what is left of a batch that failed and was halved.
    part: list[Call[S, T, R]]
    started: float
    rest: deque[list[Call[S, T, R]]] = field(default_factory=deque)

    def payloads(self) -> list[T]:
        """What `lane.run` takes."""
        return [call.payload for call in self.part]  # type: ignore[misc]  # what runs has been decoded


Outcome = Completed[R] | Exception
