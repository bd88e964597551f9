"""Workers and supervisors that are killed, stopped or crash: others serve, they are replaced, nothing is left."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from app.workers import Report
from service.files import atomic_write
from tests.app.processes import Server, serving

LIGHT: Any = {"backend": "torch", "max_batch_size": "1", "workers": "2", "instances": "2"}


def workers(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def wait_until(condition: Callable[[], bool]) -> None:
    """The callers' tests have a time limit of their own."""
    while not condition():
        pass


def replaced(server: Server, ended: int) -> None:
    while server.event("worker_listening")["worker"] != ended:
        pass


def test_the_others_are_ready_while_a_worker_starts_again(tmp_path: Path) -> None:
    with serving(**LIGHT, preload="pvt_v2_b0.digits", environment={"TMPDIR": str(tmp_path)}) as server:
        wait_until(lambda: bool([*tmp_path.glob("*/ready")]))  # every worker has been ready
        workers(server)[0].kill()
        ended = server.event("worker_ended")["worker"]
        statuses: list[int] = []
        while not [*tmp_path.glob(f"*/worker{ended}.json")] or len(statuses) < 20:
            statuses.append(httpx.get(f"{server.url}/health/ready").status_code)
        replaced(server, ended)
        statuses += [httpx.get(f"{server.url}/health/ready").status_code for _ in range(20)]

        assert set(statuses) == {200}
        assert server.stop() == 0


def test_a_worker_that_reports_that_a_thread_hangs_and_does_not_end_is_replaced(tmp_path: Path) -> None:
    """It has ten seconds to end itself, which `tests/app/test_watchdog.py` shows."""
    with serving(**LIGHT, environment={"TMPDIR": str(tmp_path)}) as server:
        (file,) = tmp_path.glob("*/worker1.json")
        report = Report(live=False, ready=False, reasons=["a thread for decode has been at one job for 31 s"])
        noticed = threading.Event()

        def report_so() -> None:
            while not noticed.wait(0.001):
                atomic_write(file, report.model_dump_json())  # again, since the worker writes its own

        with ThreadPoolExecutor() as threads:
            threads.submit(report_so)
            stuck = server.event("worker_stuck")
            noticed.set()
        replaced(server, 1)

        assert (stuck["worker"], stuck["reasons"]) == (1, report.reasons)
        assert server.stop() == 0


def test_a_crash_of_native_code_leaves_its_trace_in_the_log() -> None:
    with serving(**LIGHT) as server:
        for sig, process in zip((signal.SIGSEGV, signal.SIGABRT), workers(server), strict=True):
            server.text.clear()
            process.send_signal(sig)
            ended = server.event("worker_ended")

            assert ended["exit_code"] == -sig
            assert any(line.startswith("Fatal Python error: ") for line in server.text)
            assert any("uvicorn/server.py" in line for line in server.text)
            replaced(server, ended["worker"])
        assert server.stop() == 0


def test_no_worker_and_no_folder_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    with serving(**LIGHT, environment={"TMPDIR": str(tmp_path)}) as server:
        found = workers(server)
        found[0].suspend()  # the other one goes on
        server.process.kill()
        _, alive = psutil.wait_procs(found, timeout=30)

        assert len(found) == 2
        assert alive == []
        assert [*tmp_path.iterdir()] == []


def test_the_folder_of_a_service_whose_processes_were_all_killed_is_removed_at_the_next_start(tmp_path: Path) -> None:
    environment = {"TMPDIR": str(tmp_path)}
    with serving(**LIGHT, environment=environment) as server:
        found = workers(server)
        for process in found:
            process.suspend()
        server.process.kill()
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=30)
    left = [*tmp_path.iterdir()]
    assert len(left) == 1
    os.utime(left[0], (0, 0))

    with serving(**LIGHT, environment=environment) as server:
        assert not left[0].exists()
        assert server.stop() == 0
    assert [*tmp_path.iterdir()] == []
