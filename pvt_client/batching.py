"""Several images in a request: how many, which, and what becomes of them when the service refuses them together.

Nothing here talks to the network: `group` is a generator, and the clients carry out its steps, as those of `Exchange`.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from time import monotonic
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from pvt_client.calls import Call
from pvt_client.errors import (
    OF_ONE_IMAGE,
    ImageTooLarge,
    ImageUnreadable,
    InvalidImage,
    InvalidRequest,
    ModelChanged,
    PvtError,
    QueueFull,
    TimedOut,
)
from pvt_client.exchange import Result
from pvt_client.images import Upload, upload
from pvt_client.results import Features

T = TypeVar("T")
F = TypeVar("F")  # the future of a result

_MOST_BYTES = 4_000_000  # of a request among many; more gains nothing and is waited for longer
_QUICK, _SLOW = 0.25, 1.0  # seconds for a request; it grows while it takes less, and is halved when it takes more
# Of a request of a whole list, until the service refuses so much: its defaults, less what a form takes.
_LONGEST_LIST, _LARGEST_LIST = 64, 31_000_000

_SHOWN = 200  # characters of what is no path

Errors = Literal["return", "raise"]
"""Whether the error of an image takes the place of its result, or is raised; then a note says which image it is of."""
Progress = Callable[[int], object] | None
"""Called with the number of images, 1, whenever the next one has its result, such as `tqdm(total=n).update`."""
Make = Callable[[Sequence[Upload]], Call[list[T | PvtError]]]
"""One of the calls for several images, with its options."""
Pack = list[tuple[int, Upload]]
"""Images of one request, with their places among those that were passed."""
Step = Callable[[], Pack] | Call[list[T | PvtError]] | Result[list[T | PvtError]]
"""Read images, which may be slow; send a call, whose outcome is its result or error; or the end."""


class ManyOptions(TypedDict, total=False):
    """What becomes of the results of many images."""

    errors: Errors
    """`return` if left out."""
    progress: Progress


@dataclass
class RequestSize:
    """How much goes into a request: as much as the service takes, and answers soon.

    Threads share it without a lock: what they overwrite for one another makes no more than a smaller request.
    """

    most: int
    clock: Callable[[], float] = monotonic
    # What responses have taught.
    images: int = field(default=1, init=False)
    allowed_images: int = field(init=False)
    allowed_bytes: int = field(default=_LARGEST_LIST, init=False)

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"images_per_request is {self.most}; it is 1 or more")
        self.allowed_images = _LONGEST_LIST if self.most > 1 else 1

    def answered(self, images: int, seconds: float) -> None:
        """A request of so many images had its response after so many seconds."""
        if seconds > _SLOW:
            self.images = max(1, self.images // 2)
        elif seconds < _QUICK and images >= self.images:
            self.images = min(2 * self.images, self.most, self.allowed_images)

    def refused(self, error: PvtError, pack: Pack) -> None:
        """A request was refused as a whole."""
        if isinstance(error, QueueFull | TimedOut):
            self.images = max(1, self.images // 2)
        if len(pack) > 1 and is_too_many(error):
            self.allowed_images = len(pack) // 2
        elif len(pack) > 1 and isinstance(error, ImageTooLarge):
            self.allowed_bytes = sum(len(each.data) for _, each in pack) // 2
        self.images = min(self.images, self.allowed_images)

    def ahead(self, concurrency: int) -> int:
        """How many images may be taken and not yet yielded: while the first are slow the others go on."""
        return 2 * concurrency * (self.images + 1)


def is_too_many(error: PvtError) -> bool:
    """Whether the service refused a request for the number of its images."""
    return isinstance(error, InvalidRequest) and error.type.endswith(":too-many-images")


class Place(NamedTuple, Generic[T, F]):
    """An image, and the future of its result."""

    image: T
    future: F


class Waiting(Generic[T, F]):
    """Images that wait for one of `concurrency` requests, first come first served. Threads may share it."""

    def __init__(self, size: RequestSize, concurrency: int) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it is the number of requests at a time, 1 or more")
        self._size = size
        self._concurrency = concurrency
        # Mutable state: the images that no request has yet, and those not yet yielded, of which they are the last.
        self._waiting: deque[Place[T, F]] = deque()
        self._begun: deque[Place[T, F]] = deque()

    def append(self, image: T, future: F) -> None:
        """Add an image."""
        place = Place(image, future)
        self._begun.append(place)
        self._waiting.append(place)

    def take(self) -> list[Place[T, F]]:
        """The images of the next request: an even share of those that wait; none if others have taken them."""
        share = ceil(len(self._waiting) / self._concurrency)
        taken: list[Place[T, F]] = []
        while self._waiting and len(taken) < min(share, self._size.images):
            try:
                taken.append(self._waiting.popleft())
            except IndexError:  # another thread has taken the last
                break
        return taken

    def ready(self, *, all_taken: bool = False) -> Iterator[Place[T, F]]:
        """The next images to wait for and to yield: while too many are begun, or all that are left."""
        while self._begun and (all_taken or len(self._begun) >= self._size.ahead(self._concurrency)):
            yield self._begun.popleft()

    def clear(self) -> None:
        """Forget the images that no request has yet."""
        self._waiting.clear()


def group(images: Sequence[Any], make: Make[T], size: RequestSize, *, several: bool) -> Generator[Step[T], Any]:
    """The steps to the results of `images`, in their order, an error in the place of each that has none.

    `several`: this is one of many groups, so it is sent in small requests, and whatever error may be of one image only
    takes its place. Else it is a list of one call, which is sent at once, or in as few requests as the service takes.
    A request that is refused as a whole is sent again in halves, so that one image costs others nothing.

    Raises:
        PvtError: the other images would meet it too.
    """
    results: dict[int, T | PvtError] = {}
    reader = _Reader(images, results, size, _MOST_BYTES if several else _LARGEST_LIST)
    packs: list[Pack] = []
    pack: Pack
    outcome: list[T | PvtError] | PvtError
    while pack := packs.pop() if packs else (yield reader.read):
        start = size.clock()
        outcome = yield make([each for _, each in pack])
        if not isinstance(outcome, PvtError):
            results.update(zip((index for index, _ in pack), outcome, strict=True))
            if several:
                size.answered(len(pack), size.clock() - start)
            continue
        size.refused(outcome, pack)
        if len(pack) > 1 and _is_divisible(outcome, several=several):
            middle = len(pack) // 2
            packs += [pack[middle:], pack[:middle]]
        elif isinstance(outcome, OF_ONE_IMAGE if several else (InvalidImage, ImageTooLarge)):
            results.update({index: outcome for index, _ in pack})
        else:
            raise outcome
    yield Result([results[index] for index in range(len(images))])


def _is_divisible(error: PvtError, *, several: bool) -> bool:
    """Whether the halves of a request may get what the whole did not.

    Not after a timeout: the halves would take as long. A parameter that is wrong is refused again, in fewer and fewer
    images, but these refusals cost nothing.
    """
    if is_too_many(error) or isinstance(error, ImageTooLarge | QueueFull):  # full for so many, or small
        return True
    return several and isinstance(error, (*OF_ONE_IMAGE, InvalidRequest)) and not isinstance(error, TimedOut)


class _Reader:
    """Reads images into packs; one that can't be read gets its error into `results`."""

    def __init__(
        self, images: Sequence[Any], results: dict[int, T | PvtError], size: RequestSize, most_bytes: int
    ) -> None:
        self._size, self._most_bytes = size, most_bytes
        # Mutable state: the images to read, the one that did not fit into the last pack, and the results.
        self._unread = deque(enumerate(images))
        self._next: Pack = []
        self._results: dict[int, Any] = results

    def read(self) -> Pack:
        """The next images that fit into a request, one at least; none when all are read."""
        pack, self._next = self._next, []
        held = sum(len(each.data) for _, each in pack)
        limit = min(self._most_bytes, self._size.allowed_bytes)
        while self._unread and len(pack) < self._size.allowed_images:
            index, image = self._unread.popleft()
            try:
                read = upload(image)
            except ImageUnreadable as error:
                self._results[index] = error
                continue
            held += len(read.data)
            if pack and held > limit:
                self._next = [(index, read)]
                break
            pack.append((index, read))
        return pack


def chosen(errors: Errors, result: T | PvtError, image: object, index: int) -> T | PvtError:
    """`result` of `image`; where it is an error and `errors` is `raise`, raised with a note of which image it is of."""
    if errors not in {"return", "raise"}:
        raise ValueError(f"errors is {errors!r}; it is 'return' or 'raise'")
    if errors == "raise" and isinstance(result, PvtError):
        named = image if isinstance(image, str | os.PathLike) else type(image).__name__
        result.add_note(f"It is of image {index + 1}: {str(named)[:_SHOWN]}")
        raise result
    return result


def stacked(results: Sequence[Features | PvtError], images: Sequence[object]) -> Features:
    """The features of `images`, with a first axis for the image.

    Raises:
        PvtError: the error of the first image that has one.
        ImageUnreadable: there is none.
        ModelChanged: they are not all of one version of the model.
    """
    chosen_results = [chosen("raise", *each) for each in zip(results, images, range(len(images)), strict=True)]
    found = [each for each in chosen_results if isinstance(each, Features)]
    if not found:
        raise ImageUnreadable("an empty list has no features to stack")
    _check_same_model(found)
    first = found[0]
    of_one_request = len({each.request_id for each in found}) == 1
    return Features(
        np.stack([each.embedding for each in found]),
        {number: np.stack([each.stages[number] for each in found]) for number in first.stages},
        first.model,
        first.version,
        request_id=first.request_id if of_one_request else None,
        timing_ms=first.timing_ms if of_one_request else {},
    )


def rows(results: Sequence[Features | PvtError]) -> NDArray[np.float32]:
    """The embeddings (N, C) of N images; NaN in the row of an error. Raises as `Client.embed`."""
    found = [each for each in results if isinstance(each, Features)]
    if results and not found:
        raise next(each for each in results if isinstance(each, PvtError))
    _check_same_model(found)
    table = np.full((len(results), len(found[0].embedding) if found else 0), np.nan, np.float32)
    for row, result in zip(table, results, strict=True):
        if isinstance(result, Features):
            row[:] = result.embedding
    return table


def _check_same_model(found: Iterable[Features]) -> None:
    """Raises ModelChanged unless all are of one version of one model."""
    models = list(dict.fromkeys(f"{each.model}@{each.version}" for each in found))
    if len(models) > 1:
        raise ModelChanged(
            f"the images were answered by {' and '.join(models)}, whose vectors can't be compared: the model changed "
            f"meanwhile; name one version, as model={models[-1]!r}"
        )
