"""Several worker processes, as they are deployed."""

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.app.conftest import png
from tests.app.processes import ROOT, Server, post, serving

Samples = Mapping[tuple[object, ...], float]
# Nothing compiled, little measured.
LIGHT: Any = {"backend": "torch", "precision": "float32", "max_batch_size": "1"}
ANSWERED = ("pvt_http_requests_total", ("method", "POST"), ("route", "/predict"), ("status", "200"))


def samples(server: Server, kinds: tuple[str, ...] = ("counter", "histogram", "gauge")) -> Samples:
    """The metrics, by name and labels, as whichever worker is asked gives them."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        for sample in family.samples
        if family.type in kinds
    }


def ask_both_workers(server: Server) -> int:
    """Send images until each of two workers has answered some; gives how many were sent."""
    answered_by: set[int] = set()
    sent = 0
    with ThreadPoolExecutor(8) as threads:
        while answered_by != {0, 1}:
            assert sent < 400
            answers = threads.map(lambda _: post(server.url, [("image", png())]).status_code, range(16))
            assert set(answers) == {200}
            sent += 16
            answered_by |= {server.event("request")["worker"] for _ in range(16)}
    return sent


def test_every_worker_gives_the_sums_over_all_and_of_one_that_is_killed_and_replaced_too() -> None:
    with serving(**LIGHT, workers="2", instances="3") as server:
        sent = ask_both_workers(server)

        for _ in range(10):
            found = samples(server)
            assert found[ANSWERED] == sent
            assert found["pvt_images_total", ("model", "pvt_v2_b0.digits"), ("outcome", "answered")] == sent
            assert found["pvt_http_request_seconds_count", ("route", "/predict")] == sent
            assert found["pvt_instances",] == 3
            assert found["pvt_worker_restarts_total",] == 0
            assert found["process_resident_memory_bytes",] > 100e6

        before = samples(server, ("counter", "histogram"))
        victim = psutil.Process(server.process.pid).children()[0]

        victim.kill()
        worker = server.event("worker_ended")["worker"]
        meanwhile = httpx.get(f"{server.url}/health/ready")
        while server.event("worker_listening")["worker"] != worker:
            pass
        after = samples(server, ("counter", "histogram"))

        assert meanwhile.status_code == 200  # the other one serves in its place
        assert meanwhile.json()["reasons"] == [f"worker {worker}: starting"]
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        assert {name: value for name, value in before.items() if after[name] < value} == {}
        assert after["pvt_worker_restarts_total",] == 1
        assert samples(server)["pvt_instances",] == 3
        sent += ask_both_workers(server)
        assert samples(server)[ANSWERED] == sent
        assert server.stop() == 0


def test_a_worker_that_is_stopped_is_replaced() -> None:
    with serving(**LIGHT, workers="2", instances="2", stall_seconds="2") as server:
        victim = psutil.Process(server.process.pid).children()[0]

        victim.suspend()
        silent = server.event("worker_silent")
        ended = server.event("worker_ended")
        while server.event("worker_listening")["worker"] != silent["worker"]:
            pass

        assert ended["worker"] == silent["worker"]
        assert victim.pid not in [child.pid for child in psutil.Process(server.process.pid).children()]
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        assert samples(server)["pvt_worker_restarts_total",] == 1
        assert server.stop() == 0


def test_every_worker_loads_a_model_to_preload_and_the_folder_they_share_goes_with_them(tmp_path: Path) -> None:
    with serving(**LIGHT, workers="2", preload="pvt_v2_b0.digits", environment={"TMPDIR": str(tmp_path)}) as server:
        (shared,) = tmp_path.iterdir()
        assert shared.stat().st_mode & 0o777 == 0o700
        # A worker may have loaded its model before the other one listened.
        loaded = {record["worker"] for record in server.seen if record["event"] == "model_loaded"}
        while len(loaded) < 2:
            loaded.add(server.event("model_loaded")["worker"])

        assert loaded == {0, 1}
        assert server.stop() == 0

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "reason"), [("0", "greater than or equal to 1"), ("many", "a valid integer")])
def test_a_wrong_number_of_workers_is_refused(value: str, reason: str) -> None:
    command = [sys.executable, "-m", "app", "--workers", value]
    done = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith(f"pvt-serve: PVT_WORKERS={value}: Input should be")
    assert reason in done.stderr


@pytest.mark.parametrize(("workers", "code"), [("1", 2), ("2", 3)])
def test_a_gpu_that_is_not_there_keeps_the_service_from_starting(workers: str, code: int) -> None:
    environment = {**os.environ, "PVT_DEVICE": "cuda:7", "PVT_WORKERS": workers, "PVT_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "app"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == code
    assert "PVT_DEVICE=cuda:7: torch" in done.stderr
    assert "set PVT_DEVICE=cpu" in done.stderr


def test_without_a_folder_for_temporary_files_one_line_says_what_to_do() -> None:
    script = """
import sys, tempfile
tempfile._candidate_tempdir_list = lambda: ["/nonexistent"]
from app.__main__ import main
from app.starting import Starting
sys.argv = ["app", "--workers", "2"]
sys.exit(main(Starting()))
"""
    environment = {**os.environ, "PVT_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("pvt-serve: several workers share a folder for temporary files, and none can be made")
    assert "TMPDIR" in line
