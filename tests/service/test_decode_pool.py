"""Images are decoded by as many threads as there are cores."""

import threading
from pathlib import Path
from typing import Any

import pytest

from service import pipeline
from service.images.decoding import Decoded
from service.images.decoding import decode as real_decode
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
