"""The engine with a content cache answers what it answers without one, whatever is loaded, full or cancelled."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from prometheus_client import CollectorRegistry

from service import pipeline
from service.content_cache import CacheUse
from service.engine import Engine
from service.errors import DeadlineExceeded, InvalidImage, MemoryExhausted, QueueFull
from service.images.decoding import Decoded
from service.images.decoding import decode as real_decode
from service.results import Image, ImageResult
from tests.app.conftest import png
from tests.service.stores import add_model
from tests.service.test_engine import NAME, engine

OTHER = "pvt_v2_b0.other"


@asynccontextmanager
async def cached(root: Path, registry: CollectorRegistry | None = None, **options: Any) -> AsyncIterator[Engine]:
    """An engine with a cache, whose batches have one image each, so that equal images have equal bits."""
    options = {"max_batch_size": 1, "precision": "float32", "cache_bytes": 10_000_000, **options}
    async with engine(root, registry, **options) as e:
        yield e


async def ask(e: Engine, image: Image, **options: Any) -> ImageResult:
    (outcome,) = (await e.infer([image], **{"cache": CacheUse(), **options})).results
    assert isinstance(outcome, ImageResult), outcome
    return outcome


def same(first: ImageResult, second: ImageResult) -> bool:
    if (first.width, first.height, len(first.outputs.stages)) != (
        second.width, second.height, len(second.outputs.stages),
    ):  # fmt: skip
        return False
    one, two = ([each.logits, each.embedding, *each.stages] for each in (first.outputs, second.outputs))
    return all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> "Gate":
    return Gate(monkeypatch)


class Gate:
    """Decoding waits for `open`; `decoded` counts how often it began."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.begun, self.decoded = threading.Event(), threading.Semaphore(0), 0

        def decode(*args: Any, **options: Any) -> Decoded:
            self.decoded += 1
            self.begun.release()
            assert self.open.wait(60)
            return real_decode(*args, **options)

        patch.setattr(pipeline, "decode", decode)

    async def wait(self) -> None:
        """Until one more decode has begun."""
        assert await asyncio.to_thread(self.begun.acquire, timeout=60)


@pytest.mark.parametrize("options", [{}, {"stages": True}, {"size": (64, 32)}], ids=["own size", "stages", "size"])
async def test_answers_with_and_without_the_cache_are_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    height, width = options.get("size", (32, 32))
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    images: list[Image] = [png("red"), png("blue", (50, 90)), pixels]
    async with cached(tmp_path, cache_bytes=0) as plain:
        truth = [await ask(plain, each, **options) for each in images]
    async with cached(tmp_path) as e:
        answers = [[await ask(e, each, **options) for each in images] for _ in range(2)]
        together = (await e.infer([*images, *images], cache=CacheUse(), **options)).results

    assert [each.reuse for each in (*answers[0], *answers[1])] == [*[""] * 3, *["hit"] * 3]
    for each, expected in zip([*answers[0], *answers[1], *together], truth * 4, strict=True):
        assert isinstance(each, ImageResult)
        assert same(each, expected)


async def test_who_does_not_ask_for_the_cache_goes_round_it(tmp_path: Path) -> None:
    """So that a check of what a model computes is one."""
    async with cached(tmp_path) as e:
        answers = [await ask(e, png(), cache=each) for each in (CacheUse(), None, None)]

    assert [each.reuse for each in answers] == ["", "", ""]


async def test_what_is_kept_can_not_be_changed(tmp_path: Path) -> None:
    async with cached(tmp_path) as e:
        first = await ask(e, png(), stages=True)

    for array in (first.outputs.logits, first.outputs.embedding, *first.outputs.stages):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


async def test_a_new_version_never_gets_results_of_the_old_one(tmp_path: Path) -> None:
    """Neither with other weights, nor with the same ones behind another preprocessing."""
    registry = CollectorRegistry()
    async with cached(tmp_path, registry) as e:
        await e.set_alias("production", NAME)
        old = [await ask(e, png()), await ask(e, png(), model="production")]
        versions = {"2": {"classes": 4}, "3": {"side": 64}}
        for version, difference in versions.items():
            add_model(tmp_path, NAME, version, **difference)
            await e.refresh()
            new = [await e.infer([png()], model=name, cache=CacheUse()) for name in (NAME, NAME, "production")]
            assert [each.version for each in new] == [version] * 3
            results = [each for one in new for each in one.results if isinstance(each, ImageResult)]
            assert [each.reuse for each in results] == ["", "hit", "hit"]
            assert {each.outputs.logits.size for each in results} == {difference.get("classes", 3)}
        truth = await ask(e, png(), cache=CacheUse(lookup=False, store=False))

    assert [each.reuse for each in old] == ["", "hit"]
    assert same(results[-1], truth)
    assert not np.array_equal(old[0].outputs.logits, truth.outputs.logits)


async def test_a_model_that_is_unloaded_takes_its_results_along(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    async with cached(tmp_path, registry) as e:
        await ask(e, png())
        await ask(e, png(), size=(64, 64))
        before = registry.get_sample_value("pvt_cache_bytes")
        await e.unload(NAME)
        after = registry.get_sample_value("pvt_cache_bytes")
        again = await ask(e, png())

    assert before
    assert (after, again.reuse) == (0, "")


async def test_models_with_equal_weights_have_their_own_results(tmp_path: Path) -> None:
    add_model(tmp_path, OTHER)
    async with cached(tmp_path) as e:
        answers = [await ask(e, png(), model=name) for name in (NAME, OTHER, NAME, OTHER)]

    assert [each.reuse for each in answers] == ["", "", "hit", "hit"]


async def test_equal_images_of_many_requests_are_decoded_once(tmp_path: Path, gate: Gate) -> None:
    async with cached(tmp_path) as e:
        await e.load(NAME)
        requests = [asyncio.create_task(ask(e, png(), client=f"{i % 3}")) for i in range(12)]
        await gate.wait()
        gate.open.set()
        answers = await asyncio.gather(*requests)

    assert gate.decoded == 1
    assert [each.reuse for each in answers].count("") == 1
    assert all(same(each, answers[0]) for each in answers)


async def test_the_first_of_equal_requests_is_cancelled_and_the_others_are_answered(tmp_path: Path, gate: Gate) -> None:
    async with cached(tmp_path) as e:
        await e.load(NAME)
        first, *others = [asyncio.create_task(ask(e, png())) for _ in range(5)]
        await gate.wait()
        first.cancel()
        await asyncio.wait([first])
        gate.open.set()
        answers = await asyncio.gather(*others)

    assert gate.decoded <= 2
    assert all(same(each, answers[0]) for each in answers)


async def test_a_request_whose_time_is_up_leaves_the_others_theirs(tmp_path: Path, gate: Gate) -> None:
    async with cached(tmp_path) as e:
        await e.load(NAME)
        seconds = (0.3, 300, 0.3)
        hasty, patient, other = [asyncio.create_task(ask(e, png(), timeout_seconds=each)) for each in seconds]
        for late in (hasty, other):
            with pytest.raises(DeadlineExceeded):
                await late
        gate.open.set()

        assert same(await patient, await ask(e, png()))


async def test_a_full_queue_refuses_only_what_is_not_in_the_cache(tmp_path: Path, gate: Gate) -> None:
    async with cached(tmp_path, queue_size=1) as e:
        gate.open.set()
        await ask(e, png("red"))
        gate.open.clear()
        await gate.wait()
        under_way = asyncio.create_task(ask(e, png("blue")))
        await gate.wait()

        assert e.refusal() is None  # whatever waits: what is in the body may be in the cache
        assert (await ask(e, png("red"))).reuse == "hit"
        for images in ([png("green")], [png("red"), png("green")]):
            with pytest.raises(QueueFull):
                await e.infer(images, cache=CacheUse())
        joined = asyncio.create_task(ask(e, png("blue")))
        await asyncio.sleep(0)
        gate.open.set()
        assert (await under_way).reuse == ""
        assert (await joined).reuse in {"coalesced", "hit"}


async def test_an_image_that_can_not_be_read_is_tried_again(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    async with cached(tmp_path) as e:
        broken = b"\x89PNG\r\n\x1a\nnothing"
        outcomes = [(await e.infer([broken], cache=CacheUse())).results for _ in range(2)]

    assert all(isinstance(each, InvalidImage) for (each,) in outcomes)
    assert gate.decoded == 2


def near_equal(count: int) -> list[bytes]:
    """Images that differ in one pixel of 1200, by one step of one colour."""
    pixels = np.full((30, 40, 3), 128, np.uint8)
    images = []
    for i in range(count):
        changed = pixels.copy()
        changed[i // 40, i % 40, i % 3] += 1
        images.append(changed)
    return [encoded(each) for each in (pixels, *images)]


def encoded(pixels: Any) -> bytes:
    buffer = BytesIO()
    Pillow.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


async def test_crafted_images_that_are_nearly_equal_gain_nothing(tmp_path: Path, gate: Gate) -> None:
    """Each is computed, none gets another's answer, and all of them stay within the bound."""
    registry, images = CollectorRegistry(), near_equal(60)
    gate.open.set()
    async with cached(tmp_path, cache_bytes=0) as plain:
        truth = [await ask(plain, each) for each in images]
    gate.decoded = 0
    async with cached(tmp_path, registry, cache_bytes=50_000) as e:
        answers = [await ask(e, each) for each in images]
        held = registry.get_sample_value("pvt_cache_bytes")

    assert gate.decoded == len(images) == 61
    assert all(map(same, answers, truth))
    assert held is not None
    assert 0 < held <= 50_000


def test_a_cache_counts_in_the_budget_of_memory(tmp_path: Path) -> None:
    async def with_cache(read: Callable[[Engine], Any], **options: Any) -> Any:
        async with cached(tmp_path, **options) as e:
            return read(e)

    assert asyncio.run(with_cache(lambda e: e.memory.reserved()))["cache"] == 10_000_000
    with pytest.raises(MemoryExhausted, match="for cache do not fit"):
        asyncio.run(with_cache(repr, memory_bytes=1, cache_bytes=500_000_000))
