"""Who gets a place in the queues, who is refused, and what the refused are told. Pure: times are the caller's."""

from math import inf
from typing import Any

from service.errors import DeadlineExceeded, InvalidRequest, QueueFull, ShuttingDown
from service.scheduling.lanes import Lane
from service.scheduling.queues import fair_seconds

# A deadline is refused only if it would be missed even were the machine this much faster than when it was measured.
SPEED_MARGIN = 2.0


class Admission:
    """The places of all lanes, in front of `instances` that they share."""

    def __init__(self, instances: int) -> None:
        self._instances = instances
        # Mutable state: the lanes and whether new work is refused; how many places are taken, each lane knows.
        self.lanes: list[Lane[Any, Any, Any]] = []  # whatever they carry, it is only counted here
        self.closed = False

    @property
    def admitted(self) -> int:
        """Places taken in all lanes."""
        return sum(lane.admitted for lane in self.lanes)

    def take(self, lane: Lane[Any, Any, Any], count: int, now: float, deadline: float = inf) -> None:
        """Take `count` of the lane's places.

        Raises:
            InvalidRequest: it never has that many.
            QueueFull: it has not that many left.
            DeadlineExceeded: what is there already keeps these images from being answered by `deadline`.
            ShuttingDown: it takes no new work.
        """
        if self.closed:
            raise ShuttingDown("the service is shutting down and takes no new work; send the request again")
        if count > lane.capacity:
            raise InvalidRequest(f"{count} images in one request; PVT_QUEUE_SIZE allows {lane.capacity} at a time")
        if lane.admitted + count > lane.capacity:
            raise QueueFull(
                f"{lane.admitted} images wait for {lane.name!r} and PVT_QUEUE_SIZE allows {lane.capacity}; "
                f"{count} more do not fit now",
                retry_after_seconds=self.seconds_until_empty(lane),
            )
        least, left = self.least_seconds(lane, count), deadline - now
        if least > SPEED_MARGIN * left:
            raise DeadlineExceeded(
                f"{lane.ahead()} images wait for {lane.name!r} already: at the measured speed an answer is "
                f"{least:.3g} s away or more, and {max(0.0, left):.3g} s are left; "
                "allow more with timeout_ms, or send it again later"
            )
        lane.admitted += count

    def give_back(self, lane: Lane[Any, Any, Any], count: int) -> None:
        """Return `count` of the lane's places."""
        lane.admitted -= count

    def seconds_until_empty(self, lane: Lane[Any, Any, Any]) -> float:
        """When all that `lane` holds now is likely to be answered, its instances shared fairly with other lanes."""
        others = (other.seconds(other.admitted) for other in self.lanes if other is not lane)
        return fair_seconds(lane.seconds(lane.admitted), others, self._instances)

    def least_seconds(self, lane: Lane[Any, Any, Any], count: int) -> float:
        """Before that `count` more images of `lane` can't all be answered at the measured speed; 0 when all is idle.

        A lower bound: full batches; the last image shares the last batch with whom it can; each other instance may run
        a batch that is not over by then; decoding and what other models get in between cost nothing.
        """
        if not self.admitted:
            return 0.0
        longest = max(each.plan.time(each.plan.largest) for each in self.lanes if each.admitted or each is lane)
        ahead = lane.seconds(max(0, lane.ahead() + count - lane.plan.largest))
        return max(0.0, ahead - (self._instances - 1) * longest) / self._instances + lane.plan.time(1)
