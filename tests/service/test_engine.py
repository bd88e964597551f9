import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service import engine as engine_module
from service.engine import Engine
from service.errors import (
    DeadlineExceeded,
    InvalidImage,
    InvalidRequest,
    ModelLoadFailed,
    ServiceError,
    ShuttingDown,
    WeightsCorrupt,
)
from service.execution.executable import Executable
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.postprocess import classify
from service.registry import loader
from service.registry.loader import load as real_load
from service.results import ImageResult
from tests.app.conftest import png
from tests.service.stores import add_model

NAME = "pvt_v2_b0.tiny"


@asynccontextmanager
async def engine(root: Path, registry: CollectorRegistry | None = None, **options: Any) -> AsyncIterator[Engine]:
    add_model(root)
    chosen = EngineOptions(**{"model_store": root, "default_model": NAME, "backend": "torch", **options})
    async with Engine(chosen, EngineMetrics(registry or CollectorRegistry())) as made:
        yield made


def gated_load(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Loads wait for this event."""
    gate, loop = asyncio.Event(), asyncio.get_running_loop()

    def gated(*args: Any, **options: Any) -> Executable:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(30)
        return real_load(*args, **options)

    monkeypatch.setattr(loader, "load", gated)
    return gate


async def test_an_image_is_answered_by_the_default_model(tmp_path: Path) -> None:
    async with engine(tmp_path) as e:
        answer = await e.infer([png(size=(40, 30))])

    (result,) = answer.results
    assert isinstance(result, ImageResult)
    assert (answer.model, answer.version) == (NAME, "1")
    assert (result.width, result.height) == (40, 30)
    assert len(classify(result.outputs.logits, answer.card, 2)["predictions"]) == 2
    assert all(seconds >= 0 for seconds in result.timing)


async def test_a_model_unloaded_while_its_latency_graph_is_made_is_freed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = threading.Event(), threading.Event()
    freed: list[bool] = []
    executable: list[weakref.ref[Executable]] = []

    def add_latency_graph(made: Executable) -> None:
        executable.append(weakref.ref(made))
        begun.set()
        assert gate.wait(30)

    monkeypatch.setattr(Executable, "add_latency_graph", add_latency_graph)

    def give_back() -> None:
        gc.collect()
        freed.append(executable[0]() is None)

    monkeypatch.setattr("service.registry.loading.give_back", give_back)
    async with engine(tmp_path) as e:
        await e.infer([png()])
        assert await asyncio.to_thread(begun.wait, 30)
        unloading = asyncio.create_task(e.unload(NAME))
        await asyncio.wait([*e._loading._optimizing.values()])  # it is given up
        gate.set()
        await unloading

    assert freed == [True]


async def test_all_that_the_model_yields_comes_at_any_size(tmp_path: Path) -> None:
    async with engine(tmp_path) as e:
        answered = await e.infer([png(size=(200, 100))], size=(64, 96), stages=True)
        plain = await e.infer([png()])

    (result,) = answered.results
    assert isinstance(result, ImageResult)
    assert (answered.card.id, answered.version, answered.size) == (NAME, "1", (64, 96))
    assert (result.width, result.height, result.pixels.shape) == (200, 100, (64, 96, 3))
    assert [stage.shape[1:] for stage in result.outputs.stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert answered.head is not None
    assert answered.head.weight.shape == (3, 256)
    assert (plain.size, plain.head) == ((32, 32), None)


async def test_a_size_above_the_limit_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    async with engine(tmp_path, max_input_side=64) as e:
        with pytest.raises(InvalidRequest, match="size 32x96: PVT_MAX_INPUT_SIDE allows sides of up to 64 pixels"):
            await e.infer([png()], size=(32, 96))

        assert e._registry.loaded() == []


async def test_a_bad_image_fails_alone(tmp_path: Path) -> None:
    async with engine(tmp_path) as e:
        first, second, third = (await e.infer([png(), b"none", png()])).results

    assert isinstance(first, ImageResult)
    assert isinstance(second, InvalidImage)
    assert isinstance(third, ImageResult)


async def test_a_preloaded_model_is_waited_for_by_readiness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gated_load(monkeypatch)
    async with engine(tmp_path, preload=(NAME,)) as e:
        await asyncio.sleep(0)
        before = await e.health()
        gate.set()
        await e.infer([png()])
        after = await e.health()

    assert (before.live, before.ready) == (True, False)
    assert "to be loaded before the service is ready" in before.reasons[0]
    assert after.ready


async def test_a_deadline_covers_the_loading_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gated_load(monkeypatch)
    async with engine(tmp_path) as e:
        with pytest.raises(DeadlineExceeded, match="no answer within 10 ms"):
            await e.infer([png()], timeout_seconds=0.01)
        gate.set()

        assert (await e.infer([png()])).model == NAME


async def test_an_unexpected_error_of_a_load_is_reported_with_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **_options: Any) -> Executable:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(loader, "load", broken)
    async with engine(tmp_path) as e:
        with pytest.raises(ModelLoadFailed, match="could not be loaded: ZeroDivisionError: of all things"):
            await e.infer([png()])


async def test_a_preload_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PRELOAD_AGAIN_SECONDS", 0.01)
    mended = asyncio.Event()

    def load(*args: Any, **options: Any) -> Executable:
        if not mended.is_set():
            mended.set()
            raise WeightsCorrupt("not yet")
        return real_load(*args, **options)

    monkeypatch.setattr(loader, "load", load)
    async with engine(tmp_path, preload=(NAME,)) as e, asyncio.timeout(30):
        while not (await e.health()).ready:  # noqa: ASYNC110  its turn is what the preload needs
            await asyncio.sleep(0)

    assert mended.is_set()


async def test_aborting_ends_what_is_under_way_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(loader, "load", lambda *_, **_options: never.wait(30))
    async with engine(tmp_path) as e:
        under_way = asyncio.create_task(e.infer([png()]))
        await asyncio.sleep(0)
        e.abort()

        with pytest.raises(ShuttingDown, match="stopped before this request was answered"):
            await under_way
    never.set()


async def test_draining_answers_what_is_under_way_and_refuses_the_rest(tmp_path: Path) -> None:
    async with engine(tmp_path) as e:
        under_way = asyncio.create_task(e.infer([png()] * 8))
        await asyncio.sleep(0)
        draining = asyncio.create_task(e.drain())
        await asyncio.sleep(0)

        with pytest.raises(ShuttingDown):
            await e.infer([png()])
        assert not (await e.health()).ready
        await draining

        assert not [each for each in (await under_way).results if isinstance(each, ServiceError)]


async def test_a_stalled_thread_makes_it_neither_live_nor_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine(tmp_path, stall_seconds=30) as e:
        monkeypatch.setattr(
            "service.scheduling.scheduler.Scheduler.stalled_seconds", lambda _: {"decode": 31.0, "infer": 0.0}
        )
        health = await e.health()

    assert (health.live, health.ready) == (False, False)
    assert health.reasons[0] == "a thread for decode has been at one job for 31 s"


async def test_a_model_serves_before_its_latency_graph_is_made_and_if_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, seen = asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def failing(executable: Executable) -> None:
        seen.append(executable.stored.id)
        loop.call_soon_threadsafe(begun.set)
        raise RuntimeError("no memory for another graph")

    monkeypatch.setattr(Executable, "add_latency_graph", failing)
    async with engine(tmp_path) as e:
        first = await e.infer([png()])
        async with asyncio.timeout(30):
            await begun.wait()
        second = await e.infer([png()])

    assert seen == [NAME]
    assert all(isinstance(each.results[0], ImageResult) for each in (first, second))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("side", [32, 8], ids=["good", "bad"])
async def test_nothing_holds_an_image_once_its_request_has_ended(tmp_path: Path, side: int, count: int) -> None:
    """With garbage collection off: no cycle of references leads to it."""

    async def call(e: Engine) -> list[weakref.ref[Any]]:
        images = [np.zeros((side, side, 3), np.uint8) for _ in range(count)]
        result = await e.infer(images)
        assert all(isinstance(each, ImageResult) == (side == 32) for each in result.results)
        return [weakref.ref(image) for image in images]

    async with engine(tmp_path, max_batch_size=1) as e:
        await call(e)
        await asyncio.gather(*e._loading._optimizing.values())  # it collects garbage
        gc.collect()
        gc.disable()
        try:
            images = await call(e)
            async with asyncio.timeout(10):
                while any(image() is not None for image in images):  # noqa: ASYNC110  no event for it
                    await asyncio.sleep(0.001)  # a thread may be about to drop it
        finally:
            gc.enable()
