"""What is kept, for whom, within how many bytes; and equal images under way share one computation, whoever leaves."""

import asyncio
import gc
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service.content_cache import CacheUse, ContentCache, Ended, Outcome, Work
from service.errors import DeadlineExceeded, InvalidImage, OutOfMemory, QueueFull, ServiceError
from service.metrics import EngineMetrics
from service.results import Image, ImageResult, Outputs, Timing
from service.workers import Workers

MB = 1_000_000
ANYBODY = CacheUse()


def result(value: float = 1.0, numbers: int = 4, maps: int = 0) -> ImageResult:
    outputs = Outputs(np.full(numbers, value, np.float32), np.full(numbers, value, np.float32))
    if maps:
        outputs = outputs._replace(stages=tuple(np.full(maps, value, np.float32) for _ in range(4)))
    return ImageResult(8, 6, outputs, Timing(1, 2, 3, 4), np.full((2, 2, 3), 7, np.uint8), 5, "full")


class Model:
    """Computes one image at a time once `gate` is open; `outcomes` are taken in turn, the last one for ever."""

    def __init__(self, *outcomes: Outcome | Exception, open_: bool = True) -> None:
        self.outcomes = [*outcomes] or [result()]
        self.gate = asyncio.Event()
        self.begun = asyncio.Queue[str]()
        self.computed: list[str] = []
        if open_:
            self.gate.set()

    def work(self, client: str = "a", sized: int = 1, *, stages: bool = False, joins: bool = True) -> Work:
        async def compute(own: Sequence[int], ended: Ended) -> None:
            for i in own:
                self.computed.append(client)
                self.begun.put_nowait(client)
                outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
                await self.gate.wait()
                if isinstance(outcome, QueueFull):
                    raise outcome
                ended(i, outcome)  # type: ignore[arg-type]  # all others are outcomes

        return Work("tiny", sized, stages, client, compute, lambda _: joins)


@pytest.fixture
def make() -> Callable[..., ContentCache]:
    def make_(max_bytes: int = MB, registry: CollectorRegistry | None = None) -> ContentCache:
        return ContentCache(max_bytes, EngineMetrics(registry or CollectorRegistry()), Workers("digest", 1))

    return make_


Make = Callable[..., ContentCache]


def value(outcome: Outcome) -> tuple[float, str]:
    assert isinstance(outcome, ImageResult), outcome
    return float(outcome.outputs.logits[0]), outcome.reuse


async def one(cache: ContentCache, work: Work, image: Image = b"image", use: CacheUse = ANYBODY) -> Outcome:
    (outcome,) = await cache.infer([image], work, use)
    return outcome


async def waiting(cache: ContentCache, *works: Work) -> list["asyncio.Task[Outcome]"]:
    """Requests for the same image, each of which waits by now."""
    tasks = []
    for work in works:
        tasks.append(asyncio.create_task(one(cache, work)))
        for _ in range(3):  # turns of the loop: to its first wait
            await asyncio.sleep(0)
    return tasks


async def test_an_image_that_was_answered_is_not_computed_again(make: Make) -> None:
    cache, model = make(), Model(result(1), result(2))

    first, second = [await one(cache, model.work()) for _ in range(2)]

    assert (value(first), value(second)) == ((1.0, ""), (1.0, "hit"))
    assert model.computed == ["a"]
    assert isinstance(second, ImageResult)
    assert (second.width, second.height) == (8, 6)
    assert sum(second.timing) == second.batch_size == second.pixels.size == 0


async def test_stage_maps_are_kept_with_the_pixels_that_they_are_drawn_on(make: Make) -> None:
    cache, model = make(), Model(result(1, maps=5))

    outcomes = [await one(cache, model.work(stages=True)) for _ in range(2)]

    assert all(isinstance(each, ImageResult) and each.pixels.shape == (2, 2, 3) for each in outcomes)
    assert value(outcomes[1]) == (1.0, "hit")


@pytest.mark.parametrize("other", [
    {"image": b"imagE"}, {"image": b"image\0"}, {"sized": 2}, {"stages": True}, {"use": CacheUse(partition="b")},
    {"image": np.frombuffer(b"image", np.uint8)},
])  # fmt: skip
async def test_what_differs_in_anything_that_counts_is_computed(make: Make, other: dict[str, Any]) -> None:
    cache, model = make(), Model(result(1), result(2))
    await one(cache, model.work())

    image, use = other.pop("image", b"image"), other.pop("use", ANYBODY)

    assert value(await one(cache, model.work(**other), image, use)) == (2.0, "")


@pytest.mark.parametrize("other", [np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.int8)])
async def test_pixels_of_another_shape_or_type_are_other_pixels(make: Make, other: Any) -> None:
    cache, model = make(), Model(result(1), result(2))
    await one(cache, model.work(), np.zeros((6, 4, 3), np.uint8))

    assert value(await one(cache, model.work(), other)) == (2.0, "")
    assert value(await one(cache, model.work(), np.zeros((6, 8, 3), np.uint8)[:, ::2])) == (1.0, "hit")


async def test_large_images_are_digested_on_a_thread_to_the_same_key(make: Make) -> None:
    cache, model = make(), Model(result(1), result(2), result(3))
    large = bytes(MB)

    answers = [await one(cache, model.work(), each) for each in (large, large, large[:-1] + b"\1")]

    assert [value(each) for each in answers] == [(1.0, ""), (1.0, "hit"), (2.0, "")]


async def test_equal_images_under_way_share_one_computation(make: Make) -> None:
    registry = CollectorRegistry()
    cache, model = make(registry=registry), Model(result(1), result(2), open_=False)

    tasks = await waiting(cache, *(model.work(client) for client in ("a", "a", "b")))
    model.gate.set()
    outcomes = await asyncio.gather(*tasks)

    assert model.computed == ["a"]
    assert [value(each) for each in outcomes] == [(1.0, ""), (1.0, "coalesced"), (1.0, "coalesced")]
    count = registry.get_sample_value
    assert [count(f"pvt_cache_{each}_total", {"model": "tiny"}) for each in ("hits", "misses", "coalesced")] == [
        None, 1, 2,
    ]  # fmt: skip
    assert count("pvt_images_total", {"model": "tiny", "outcome": "answered"}) == 2  # the pipeline counts the first


async def test_the_first_client_hangs_up_and_the_others_are_answered(make: Make) -> None:
    cache, model = make(), Model(result(1), result(2), open_=False)
    first, *others = await waiting(cache, *[model.work()] * 4)

    first.cancel()
    await asyncio.wait([first])
    model.gate.set()

    assert [value(each) for each in await asyncio.gather(*others)] == [(2.0, ""), *[(2.0, "coalesced")] * 2]
    assert len(model.computed) == 2
    assert first.cancelled()


async def test_one_that_waits_hangs_up_and_harms_nobody(make: Make) -> None:
    cache, model = make(), Model(result(1), result(2), open_=False)
    first, second, third = await waiting(cache, *[model.work()] * 3)

    second.cancel()
    await asyncio.wait([second])
    model.gate.set()

    assert [value(await first), value(await third)] == [(1.0, ""), (1.0, "coalesced")]
    assert second.cancelled()


@pytest.mark.parametrize(
    "failure", [QueueFull("full"), DeadlineExceeded("late"), OutOfMemory("no room")], ids=lambda e: type(e).__name__
)
async def test_a_refusal_or_failure_of_one_is_not_that_of_the_others(make: Make, failure: ServiceError) -> None:
    cache, model = make(), Model(failure, result(2), open_=False)
    first, *others = await waiting(cache, *[model.work()] * 3)

    model.gate.set()
    outcomes = await asyncio.gather(*others)
    (failed,) = await asyncio.gather(first, return_exceptions=True)

    assert failed is failure
    assert [value(each)[0] for each in outcomes] == [2.0, 2.0]
    assert len(model.computed) == 2
    assert value(await one(cache, model.work())) == (2.0, "hit")


async def test_what_is_wrong_with_an_image_is_wrong_for_all_who_wait_and_is_not_kept(make: Make) -> None:
    cache, model = make(), Model(InvalidImage("broken"), result(2), open_=False)
    tasks = await waiting(cache, *[model.work()] * 3)

    model.gate.set()
    errors = await asyncio.gather(*tasks)

    assert model.computed == ["a"]
    assert [str(each) for each in errors] == ["broken"] * 3
    assert len({id(each) for each in errors}) == 3  # an error that is raised keeps its frames
    assert value(await one(cache, model.work())) == (2.0, "")


async def test_nobody_waits_behind_the_queue_of_another_client(make: Make) -> None:
    cache, model = make(), Model(result(1), result(2), open_=False)

    tasks = await waiting(cache, model.work("a"), model.work("b", joins=False), model.work("a"))
    model.gate.set()

    assert [value(await each) for each in tasks] == [(1.0, ""), (2.0, ""), (1.0, "coalesced")]


async def test_other_clients_that_hang_up_keep_nobody_waiting_for_long(make: Make) -> None:
    cache, model = make(), Model(result(1), result(2), result(3), open_=False)
    first, second, honest = await waiting(cache, model.work("a"), model.work("a"), model.work("b"))

    first.cancel()
    for _ in range(3):  # the second attacker's, and the honest client's own
        await model.begun.get()
    second.cancel()
    model.gate.set()

    assert value(await honest)[1] == ""
    assert model.computed == ["a", "a", "b"]


async def test_an_image_twice_in_a_request_is_computed_once(make: Make) -> None:
    cache, model = make(), Model(result(1), result(2), result(3))

    outcomes = await cache.infer([b"x", b"y", b"x", InvalidImage("unread")], model.work(), ANYBODY)

    assert [value(each) for each in outcomes[:3]] == [(1.0, ""), (2.0, ""), (1.0, "coalesced")]
    assert len(model.computed) == 3  # the error too goes the usual way


async def test_results_of_a_request_stay_when_what_it_waited_for_fails_and_is_refused(make: Make) -> None:
    """Two images, of which another request computes one and hangs up; by then the queue is full."""
    cache, model = make(), Model(result(1), result(2), QueueFull("full"), open_=False)
    (first,) = await waiting(cache, model.work("a"))
    second = asyncio.create_task(cache.infer([b"other", b"image"], model.work("b"), ANYBODY))
    for _ in range(2):
        await model.begun.get()

    first.cancel()
    model.gate.set()
    outcomes = await second

    assert value(outcomes[0]) == (2.0, "")
    assert isinstance(outcomes[1], QueueFull)


async def test_no_cache_computes_anew_and_stores_and_no_store_does_neither(make: Make) -> None:
    cache, model = make(), Model(*map(result, range(1, 9)))
    await one(cache, model.work())

    assert value(await one(cache, model.work(), use=CacheUse(lookup=False))) == (2.0, "")
    assert value(await one(cache, model.work())) == (2.0, "hit")
    assert value(await one(cache, model.work(), b"secret", CacheUse(store=False))) == (3.0, "")
    assert value(await one(cache, model.work(), b"secret")) == (4.0, "")


async def test_the_least_recently_used_results_make_room_within_the_bound(make: Make) -> None:
    registry = CollectorRegistry()
    cache, model = make(20_000, registry), Model(*map(result, range(1000)))
    images = [b"%d" % i for i in range(200)]

    for image in images:
        await one(cache, model.work(), image)
        assert value(await one(cache, model.work(), images[0]))[0] == 0  # used all the time, so kept
        held = registry.get_sample_value("pvt_cache_bytes")
        assert held is not None
        assert held <= 20_000

    evicted = registry.get_sample_value("pvt_cache_evictions_total")
    assert evicted is not None
    assert evicted > 180
    assert value(await one(cache, model.work(), images[1]))[1] == ""
    assert value(await one(cache, model.work(), images[-1]))[1] == "hit"


async def test_a_result_larger_than_the_bound_evicts_nothing(make: Make) -> None:
    cache, model = make(20_000), Model(result(1), result(2, maps=MB), result(3))
    await one(cache, model.work())

    assert value(await one(cache, model.work(), b"large"))[1] == ""
    assert value(await one(cache, model.work(), b"large"))[1] == ""
    assert value(await one(cache, model.work()))[1] == "hit"


async def test_a_model_that_goes_takes_its_results_along(make: Make) -> None:
    registry = CollectorRegistry()
    cache, model = make(10 * MB, registry), Model(result(1))
    for sized in (1, 2):
        for i in range(1500):
            await one(cache, model.work(sized=sized), b"%d" % i)
    before = registry.get_sample_value("pvt_cache_bytes")

    await cache.forget(1)

    assert before is not None
    assert registry.get_sample_value("pvt_cache_bytes") == before / 2
    assert value(await one(cache, model.work(sized=1), b"0"))[1] == ""
    assert value(await one(cache, model.work(sized=2), b"0"))[1] == "hit"


@pytest.mark.parametrize(("numbers", "maps"), [(3, 0), (1000, 0), (1000, 20_000)])
async def test_the_bytes_that_are_counted_are_those_that_are_taken(make: Make, numbers: int, maps: int) -> None:
    registry = CollectorRegistry()
    cache, count = make(100 * MB, registry), 200
    await one(cache, Model().work())  # what is made once
    gc.collect()
    tracemalloc.start()
    try:
        before, counted = tracemalloc.get_traced_memory()[0], registry.get_sample_value("pvt_cache_bytes") or 0
        for i in range(count):
            await one(cache, Model(result(i, numbers, maps)).work(stages=bool(maps)), b"%d" % i)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    counted = (registry.get_sample_value("pvt_cache_bytes") or 0) - counted

    assert taken <= counted <= 1.6 * taken
