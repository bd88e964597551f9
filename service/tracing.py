"""How far the images of a traced request got, and when: what the engine leaves for whoever makes spans of it.

Nothing in this module runs for a request that is not traced. Times are seconds on `time.monotonic`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from service.results import Timing

if TYPE_CHECKING:  # whose types are all that is needed of it
    from opentelemetry.trace import Span, SpanContext


class Stage(NamedTuple):
    """One stage of a request; `finished` unless the request ended in it."""

    name: str
    start: float
    end: float
    finished: bool = True


@dataclass(eq=False, slots=True)
class ImageTrace:
    """One image of `request`, which was submitted at that time."""

    request: "RequestTrace"
    submitted: float
    # Mutable state: since when it is decoded, waits for an instance, is in its batch, and has ended; of an image that
    # was answered its stages, and when its batch began.
    decoding: float | None = None
    decoded: float | None = None
    running: float | None = None
    ended: float | None = None
    timing: Timing | None = None
    batch_began: float = 0.0

    def stages(self, end: float) -> Iterator[Stage]:
        """Those of `Timing`, as far as it got: of an image that was answered exactly what `Server-Timing` has.

        `end`: of its request, if it has not ended itself.
        """
        if self.timing:
            start = self.batch_began - sum(self.timing[:-1])
            for name, seconds in zip(Timing._fields, self.timing, strict=True):
                yield Stage(name, start, start + seconds)
                start += seconds
            return
        begun = (self.submitted, self.decoding, self.decoded, self.running)
        for name, since, until in zip(Timing._fields, begun, (*begun[1:], None), strict=True):
            if since is not None:
                yield Stage(name, since, until or self.ended or end, finished=until is not None)


@dataclass(eq=False, slots=True)
class RequestTrace:
    """One request: its span, its ids for log and exemplars, and whether the span is recorded or only passed on."""

    span: "Span"
    ids: Mapping[str, str]
    recorded: bool
    # Mutable state: whether it has ended; since when it has waited for its model, and until when; its images, and the
    # batches in which they were.
    ended: bool = False
    loading: float | None = None
    loaded: float | None = None
    images: list[ImageTrace] = field(default_factory=list)
    batches: list["SpanContext"] = field(default_factory=list)

    def stages(self, end: float) -> Iterator[Stage]:
        """The load, and the stages of the slowest image; where none was answered, of the one that ended last.

        `end`: of the request.
        """
        if self.loading is not None:
            yield Stage("load", self.loading, self.loaded or end, finished=self.loaded is not None)
        if self.images:
            answered = [each for each in self.images if each.timing]
            yield from max(answered or self.images, key=lambda each: sum(each.timing or (each.ended or 0.0,))).stages(
                end
            )


# The request that the current task works for.
current: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)

# A context in which the batch of these images runs; what it runs is said by name.
BatchTracer = Callable[[Sequence[ImageTrace], Mapping[str, str | int]], AbstractContextManager[None]]


def recorded_request() -> RequestTrace | None:
    """The request that the current task works for, if its span is recorded."""
    request = current.get()
    return request if request and request.recorded else None


def submitted(now: float) -> ImageTrace | None:
    """One more image of that request."""
    if not (request := recorded_request()):
        return None
    image = ImageTrace(request, now)
    request.images.append(image)
    return image
