"""What the scheduler does and has done lately. Times are seconds."""

from dataclasses import dataclass

from service.scheduling.queues import ReleaseReason

RELEASES = 64  # how many are remembered


@dataclass(eq=False, slots=True)
class Release:
    """A batch that went to an instance.

    `size` counts images, `waited_seconds` is the longest that one of them had waited, `started` is on the scheduler's
    clock, `run_seconds` is None while the batch runs; it covers the second runs of a batch that failed.
    """

    model: str
    reason: ReleaseReason
    size: int
    instance: int
    alone: bool
    waited_seconds: float
    started: float
    run_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class QueueActivity:
    """The queue of one `lane` of `model`: images to decode, in decoding, waiting for an instance, running.

    `admitted` counts all of these, and images that are about to enter or have just left. `virtual_seconds` is the share
    of the instances it has had, for fairness; `plan` is t(n) in seconds by batch size.
    """

    lane: str
    model: str
    to_decode: int
    decoding: int
    waiting: int
    running: int
    admitted: int
    capacity: int
    virtual_seconds: float
    plan: dict[int, float]


@dataclass(frozen=True, slots=True)
class InstanceActivity:
    """One instance, and the batch that it has run for `seconds`, if it runs one."""

    instance: int
    release: Release | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PastRelease:
    """A `Release` that began `seconds_ago`."""

    release: Release
    seconds_ago: float


@dataclass(frozen=True, slots=True)
class Activity:
    """The scheduler at one moment; the last releases come newest first."""

    queues: list[QueueActivity]
    instances: list[InstanceActivity]
    releases: list[PastRelease]
