"""Images are decoded by as many threads as there are cores; those that stand in line are seen there."""

import asyncio
import threading
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service import pipeline
from service.images.decoding import Decoded
from service.images.decoding import decode as real_decode
from service.results import ImageResult
from tests.app.conftest import png
from tests.service.test_engine import engine

CORES = 3


async def test_as_many_images_are_decoded_at_once_as_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, lock, threads, most, running = threading.Barrier(CORES), threading.Lock(), set(), 0, 0

    def decode(*args: Any, **options: Any) -> Decoded:
        nonlocal most, running
        with lock:
            threads.add(threading.current_thread().name)
            running += 1
            most = max(most, running)
        together.wait(30)  # breaks, and with it the test, where fewer run at once
        with lock:
            running -= 1
        return real_decode(*args, **options)

    monkeypatch.setattr(pipeline, "decode", decode)
    async with engine(tmp_path, cores=CORES, instances=1) as e:
        await e.infer([png()] * (4 * CORES))

    assert most == CORES
    assert all(name.startswith("pvt-work") for name in threads)


@pytest.mark.parametrize("switch", [True, False])
async def test_the_switch_of_scaled_decoding_reaches_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: bool
) -> None:
    seen = []

    def decode(*args: Any, **options: Any) -> Decoded:
        seen.append(options["scaled_jpeg"])
        return real_decode(*args, **options)

    monkeypatch.setattr(pipeline, "decode", decode)
    async with engine(tmp_path, scaled_jpeg=switch) as e:
        await e.infer([png()])

    assert seen == [switch]


async def test_waiting_for_a_thread_is_not_decoding(tmp_path: Path) -> None:
    async with engine(tmp_path, cores=1, instances=1) as e:
        result = await e.infer([png(size=(1800, 1800))] * 6)

    first, *others = sorted(
        (each.timing for each in result.results if isinstance(each, ImageResult)), key=itemgetter(0)
    )
    assert len(others) == 5
    # One after another: the last one waited while all others were decoded, each for itself.
    assert others[-1].wait >= first.decode + sum(each.decode for each in others[:-1])
    assert first.wait < others[-1].wait / 2
    assert others[-1].decode < others[-1].wait / 2


async def test_what_stands_in_line_is_seen_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def decode(*args: Any, **options: Any) -> Decoded:
        begun.set()
        assert go_on.wait(30)
        return real_decode(*args, **options)

    monkeypatch.setattr(pipeline, "decode", decode)
    registry = CollectorRegistry()
    async with engine(tmp_path, cores=1, instances=1, queue_size=40, registry=registry) as e:
        task = asyncio.create_task(e.infer([png()] * 33))
        await asyncio.to_thread(begun.wait, 30)

        e.collect_metrics()
        labels = {"model": "pvt_v2_b0.tiny"}
        states = ("waiting_decode", "decoding", "queued", "running")
        seen = [registry.get_sample_value("pvt_queue_images", {**labels, "state": each}) for each in states]
        assert seen == [32, 1, 0, 0]
        assert registry.get_sample_value("pvt_queue_capacity_images", labels) == 40

        go_on.set()
        await task
        await e.unload("pvt_v2_b0.tiny")
        e.collect_metrics()
        assert registry.get_sample_value("pvt_queue_images", {**labels, "state": "waiting_decode"}) == 0
        assert registry.get_sample_value("pvt_queue_capacity_images", labels) == 0
