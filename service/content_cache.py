"""Results of images that were answered before, and one computation for equal images that are under way.

A result depends on the image's bytes, on the loaded model at one input size, and on whether it has stage maps. All of
that is in its key, so no entry is ever out of date. A model that is unloaded takes its entries along.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from time import perf_counter
from typing import NamedTuple

import numpy as np

from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.metrics import EngineMetrics
from service.results import Image, ImageResult, Outputs, Timing
from service.sharing import fresh
from service.workers import Workers

DIGEST_BYTES = 131_072  # of images whose digests are made on the event loop; more would hold it up for over 0.1 ms
# That an entry takes beside its arrays, and each of these beside its data; tests/service compares with tracemalloc.
ENTRY_BYTES, ARRAY_BYTES = 500, 200
_DROPPED_AT_ONCE = 1000  # entries of an unloaded model; then the event loop has its turn
_NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
_NO_TIME = Timing(0, 0, 0, 0)

Outcome = ImageResult | ServiceError
Ended = Callable[[int, Outcome], None]


class CacheUse(NamedTuple):
    """Whether a request may be answered from the cache, and its results be stored, among those of one `partition`."""

    lookup: bool = True
    store: bool = True
    partition: str = ""


class Key(NamedTuple):
    """What a result depends on, and who may find it. `sized` is the number of a loaded model at one input size.

    `form` is empty for an encoded image, and type and shape of pixels; `digest` is the SHA-256 of the bytes.
    """

    sized: int
    stages: bool
    partition: str
    form: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Work:
    """How a request's images are computed. `sized` and `stages` are as in `Key`.

    `compute` runs those with the given indices, and calls `ended` with the index and outcome of each; it raises a
    ServiceError where it refuses them all. `may_join` says whether to wait for a computation of another client.
    """

    model: str
    sized: int
    stages: bool
    client: str
    compute: Callable[[Sequence[int], Ended], Awaitable[object]]
    may_join: Callable[[str], bool]


@dataclass(eq=False, slots=True)
class _Running:
    """A computation of `client`; its outcome is None where another request has to compute the image itself."""

    client: str
    outcome: "asyncio.Future[Outcome | None]"


class _Entry(NamedTuple):
    result: ImageResult
    bytes: int


@dataclass(slots=True)
class _Request:
    """A request's images by their keys (None: an error in place of one), since when, and the outcomes so far."""

    work: Work
    use: CacheUse
    keys: list[Key | None]
    start: float
    outcomes: dict[int, Outcome]
    # The computations of this request that others may wait for.
    leading: dict[int, _Running]


class ContentCache:
    """Keeps the most recently used results, within a number of bytes. Its methods belong to one event loop."""

    def __init__(self, max_bytes: int, metrics: EngineMetrics, workers: Workers) -> None:
        """`workers` make the digests of large images."""
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._workers = workers
        # Mutable state: the entries, least recently used first, and their bytes; the computations under way.
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._bytes = 0
        self._running: dict[Key, _Running] = {}

    def __repr__(self) -> str:
        return (
            f"<ContentCache {len(self._entries)} entries {self._bytes}/{self._max_bytes} running={len(self._running)}>"
        )

    async def infer(self, images: Sequence[Image], work: Work, use: CacheUse) -> list[Outcome]:
        """The outcome of each of `images`: found, of a computation that another request has begun, or computed.

        A computation that ends without a result, because its request was cancelled, refused or too late, is begun again
        by the first of those that wait for it, within its own time and share. Only what is wrong with the image itself
        is an outcome for all of them.

        Raises:
            ServiceError: what `work.compute` raises for all images that it was to compute.
        """
        start = perf_counter()
        request = _Request(work, use, await self._keys(images, work, use.partition), start, {}, {})
        waited = False
        while left := [i for i in range(len(images)) if i not in request.outcomes]:
            own: list[int] = []
            joined: dict[int, _Running] = {}
            for i in left:
                if self._answer(request, i):
                    continue
                if running := self._joinable(request, i, waited=waited):
                    joined[i] = running
                else:
                    own.append(i)
                    self._begin(request, i)
            if own:
                await self._compute(request, own, raises=not waited)
            for i, running in joined.items():
                if outcome := await asyncio.shield(running.outcome):
                    request.outcomes[i] = self._coalesced(outcome, request)
            waited = True
        return [request.outcomes[i] for i in range(len(images))]

    async def forget(self, sized: int) -> None:
        """Drop the entries of a model that is unloaded, or of an input size of it that is."""
        for i, key in enumerate([*self._entries]):
            if key.sized == sized and (entry := self._entries.pop(key, None)):
                self._bytes -= entry.bytes
            if i % _DROPPED_AT_ONCE == _DROPPED_AT_ONCE - 1:
                await asyncio.sleep(0)
        self._metrics.cache_bytes.set(self._bytes)

    async def _keys(self, images: Sequence[Image], work: Work, partition: str) -> list[Key | None]:
        key = partial(_key, work, partition)
        if sum(map(_bytes, images)) <= DIGEST_BYTES:
            return [key(image) for image in images]
        return await self._workers.run(lambda: [key(image) for image in images])

    def _answer(self, request: _Request, i: int) -> bool:
        """Whether image `i` is answered by an entry."""
        key = request.keys[i]
        if key is None or not request.use.lookup or not (entry := self._entries.get(key)):
            return False
        self._entries.move_to_end(key)
        request.outcomes[i] = entry.result
        self._metrics.cache_hit(request.work.model, perf_counter() - request.start)
        return True

    def _joinable(self, request: _Request, i: int, *, waited: bool) -> _Running | None:
        """The computation to wait for; of another client one only, so that none can keep this request waiting."""
        key = request.keys[i]
        if key is None or not request.use.lookup or not (running := self._running.get(key)):
            return None
        if running.client == request.work.client or (not waited and request.work.may_join(running.client)):
            return running
        return None

    def _begin(self, request: _Request, i: int) -> None:
        """Image `i` is about to be computed, and others may wait for that."""
        key, use = request.keys[i], request.use
        if key is None:
            return
        if use.lookup:
            self._metrics.cache_misses.labels(request.work.model).inc()
        if use.store and key not in self._running:
            future = asyncio.get_running_loop().create_future()
            self._running[key] = request.leading[i] = _Running(request.work.client, future)

    async def _compute(self, request: _Request, own: list[int], *, raises: bool) -> None:
        """Compute the images `own`; without `raises`, a refusal is the outcome of each."""

        def ended(i: int, outcome: Outcome) -> None:
            request.outcomes[i] = outcome
            if isinstance(outcome, ImageResult):
                self._store(request, i, outcome)
                self._finish(request, i, outcome)
            else:  # what is wrong with the image is wrong for all
                of_image = isinstance(outcome, InvalidImage | ImageTooLarge)
                self._finish(request, i, fresh(outcome) if of_image else None)

        try:
            await request.work.compute(own, ended)
        except ServiceError as error:
            if raises:
                raise
            request.outcomes |= {i: fresh(error) for i in own}
        finally:
            for i in [*request.leading]:
                self._finish(request, i, None)

    def _finish(self, request: _Request, i: int, outcome: Outcome | None) -> None:
        """Those that wait for image `i` get `outcome`, or compute it themselves."""
        if (running := request.leading.pop(i, None)) and (key := request.keys[i]):
            del self._running[key]
            running.outcome.set_result(outcome)

    def _store(self, request: _Request, i: int, result: ImageResult) -> None:
        key = request.keys[i]
        if key is None or not request.use.store:
            return
        kept = replace(result, timing=_NO_TIME, batch_size=0, batch_reason="", reuse="hit")
        if not key.stages:
            kept = replace(kept, pixels=_NO_PIXELS)  # which only maps are drawn on
        entry = _Entry(kept, _size(kept))
        if entry.bytes > self._max_bytes:
            return
        if before := self._entries.pop(key, None):
            self._bytes -= before.bytes
        self._entries[key] = entry
        self._bytes += entry.bytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1].bytes
            self._metrics.cache_evictions.inc()
        self._metrics.cache_bytes.set(self._bytes)

    def _coalesced(self, outcome: Outcome, request: _Request) -> Outcome:
        """`outcome` of another request's computation, for this one, which has waited for it."""
        self._metrics.cache_coalesced(request.work.model, answered=isinstance(outcome, ImageResult))
        if isinstance(outcome, ServiceError):
            return fresh(outcome)
        timing = _NO_TIME._replace(wait=perf_counter() - request.start)
        return replace(outcome, timing=timing, batch_size=0, batch_reason="", reuse="coalesced")


def owned(outputs: Outputs) -> Outputs:
    """A copy that keeps no other image's outputs in memory, and that nobody can change."""
    copied = Outputs(outputs.logits.copy(), outputs.embedding.copy(), tuple(each.copy() for each in outputs.stages))
    for array in (copied.logits, copied.embedding, *copied.stages):
        array.setflags(write=False)
    return copied


def _key(work: Work, partition: str, image: Image) -> Key | None:
    if isinstance(image, ServiceError):
        return None
    if isinstance(image, bytes):
        return Key(work.sized, work.stages, partition, "", sha256(image).digest())
    pixels = np.ascontiguousarray(image)
    form = f"{pixels.dtype.str}{pixels.shape}"
    return Key(work.sized, work.stages, partition, form, sha256(pixels.data).digest())


def _bytes(image: Image) -> int:
    if isinstance(image, ServiceError):
        return 0
    return len(image) if isinstance(image, bytes) else image.nbytes


def _size(result: ImageResult) -> int:
    """Bytes of an entry."""
    outputs = (result.outputs.logits, result.outputs.embedding, *result.outputs.stages)
    return ENTRY_BYTES + ARRAY_BYTES + result.pixels.nbytes + sum(ARRAY_BYTES + each.nbytes for each in outputs)
