import asyncio
import threading

import pytest

from service.workers import Workers


async def test_a_job_runs_on_a_thread_with_the_pools_name() -> None:
    workers = Workers("decode", 1)

    assert (await workers.run(lambda: threading.current_thread().name)).startswith("pvt-decode")
    workers.close()


async def test_a_job_that_waits_for_a_thread_goes_with_its_caller() -> None:
    workers, release, ran = Workers("decode", 1), threading.Event(), threading.Event()
    first = asyncio.create_task(workers.run(release.wait))
    second = asyncio.create_task(workers.run(ran.set))
    await asyncio.sleep(0)

    second.cancel()
    await asyncio.wait([second])
    release.set()
    await first
    await workers.run(lambda: None)

    assert not ran.is_set()
    workers.close()


async def test_a_job_that_goes_on_and_on_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("service.workers.monotonic", lambda: now)
    workers, started, release = Workers("decode", 2), threading.Event(), threading.Event()

    def stuck() -> None:
        started.set()
        release.wait()

    task = asyncio.create_task(workers.run(stuck))
    await asyncio.to_thread(started.wait)
    now = 142.0

    assert workers.stalled_seconds() == 42.0
    release.set()
    await task
    assert workers.stalled_seconds() == 0.0
    workers.close()
