"""A process that is stuck ends in order, and one that was only stopped does not."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.watchdog import STUCK
from tests.app.conftest import png
from tests.app.processes import Server, post, serving

LIGHT: Any = {"backend": "torch", "precision": "float32", "instances": "1", "max_batch_size": "1"}
FAULTY = ("-m", "tests.app.faulty")
STALL_SECONDS = 4


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fault") / "file"


@pytest.fixture(scope="module")
def two_workers(fault: Path) -> Iterator[Server]:
    environment = {"FAULT_FILE": str(fault)}
    settings = {**LIGHT, "workers": "2", "stall_seconds": str(STALL_SECONDS), "preload": "pvt_v2_b0.digits"}
    with serving(command=FAULTY, environment=environment, **settings) as server:
        yield server


def family(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children()]


def wait_until_a_batch_runs(server: Server) -> None:
    running = 'pvt_queue_images{model="pvt_v2_b0.digits",state="running"} 1.0'
    while running not in httpx.get(f"{server.url}/metrics", timeout=60).text:
        pass


def wait_until_ready(server: Server) -> None:
    while httpx.get(f"{server.url}/health/ready", timeout=60).status_code != 200:
        pass


def test_time_in_which_all_was_stopped_makes_nothing_unhealthy(two_workers: Server, fault: Path) -> None:
    """As `docker pause` does, in the middle of a batch."""
    wait_until_ready(two_workers)
    fault.write_text("hold")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(post, two_workers.url, [("image", png())])
        wait_until_a_batch_runs(two_workers)

        for process in family(two_workers):
            process.suspend()
        threading.Event().wait(STALL_SECONDS + 2)
        for process in reversed(family(two_workers)):
            process.resume()
        found = [httpx.get(f"{two_workers.url}/health/live", timeout=60) for _ in range(8)]
        fault.unlink()

        assert [each.json()["reasons"] for each in found] == [[]] * 8
        assert {each.status_code for each in found} == {200}
        assert answer.result().status_code == 200
        assert "pvt_worker_restarts_total 0.0" in httpx.get(f"{two_workers.url}/metrics").text


def test_a_worker_that_is_stuck_answers_503_and_is_replaced(two_workers: Server, fault: Path) -> None:
    fault.write_text("stick")
    answer = post(two_workers.url, [("image", png())])
    ended = two_workers.event("worker_ended")
    fault.unlink()
    while two_workers.event("worker_listening")["worker"] != ended["worker"]:
        pass

    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert ended["exit_code"] == STUCK
    assert post(two_workers.url, [("image", png())]).status_code == 200
    assert two_workers.stop() == 0


def test_a_native_call_that_never_returns_ends_the_process_and_those_who_wait_get_503(fault: Path) -> None:
    environment = {"FAULT_FILE": str(fault)}
    with serving(command=FAULTY, environment=environment, stall_seconds="2", **LIGHT) as server:
        assert post(server.url, [("image", png())]).status_code == 200
        fault.write_text("stick")
        with ThreadPoolExecutor(4) as pool:
            answers = [*pool.map(lambda _: post(server.url, [("image", png())]), range(4))]
        stuck = server.event("stuck")
        code = server.process.wait(60)
        fault.unlink()
        while (line := server.lines.get(timeout=60)) is not None:
            server.text.append(line)

    assert [answer.status_code for answer in answers] == [503] * 4
    assert answers[0].json()["type"].endswith("shutting-down")
    assert code == STUCK != 0
    assert stuck["reasons"][0].startswith("a thread for infer has been at one job for ")
    assert any("never_return" in line for line in server.text)  # the stacks say which call it was
