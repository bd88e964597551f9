import asyncio
import threading

import pytest

from service.workers import Workers, detached


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


async def test_detached_work_gives_its_result_or_its_error() -> None:
    assert await detached(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await detached(lambda: 1 // 0)


async def test_a_caller_that_goes_leaves_detached_work_to_end_by_itself() -> None:
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait(30)
        ended.set()
        raise ZeroDivisionError

    task = asyncio.create_task(detached(work))
    await asyncio.to_thread(started.wait, 30)
    task.cancel()
    await asyncio.wait([task])
    assert not ended.is_set()

    release.set()
    assert await asyncio.to_thread(ended.wait, 30)


async def test_detached_work_does_not_keep_the_process() -> None:
    assert await detached(lambda: threading.current_thread().daemon)
