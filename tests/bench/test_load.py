import subprocess
from pathlib import Path

import pytest

from bench.load import Load, Wrk

REPORT = """\
Running 4s test @ http://127.0.0.1:8111/predict
  1 threads and 8 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    38.84ms    7.60ms  70.10ms   72.50%
    Req/Sec   205.38     15.45   250.00     72.50%
  Latency Distribution
     50%   38.83ms
     75%   42.71ms
     90%  847.00us
     99%    1.25s
  821 requests in 4.02s, 371.04KB read
  Socket errors: connect 1, read 2, write 0, timeout 3
  Non-2xx or 3xx responses: 7
Requests/sec:    204.32
Transfer/sec:     92.34KB
"""


def fake_run(report: str) -> object:
    return lambda *_args, **_kwargs: subprocess.CompletedProcess([], 0, stdout=report)


def test_a_report_of_wrk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_run(REPORT))

    load = Wrk(tmp_path, [b"a", b"b"]).run("http://localhost/predict", 8, 4)

    assert load == Load(clients=8, images_per_second=204.32, p50_ms=38.83, p99_ms=1250.0, failed=13)


def test_a_report_of_another_shape_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_run("nonsense"))

    with pytest.raises(RuntimeError, match="nonsense"):
        Wrk(tmp_path, [b"a"]).run("http://localhost/predict", 1, 1)


def test_wrk_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(RuntimeError, match="wrk is missing; install it"):
        Wrk(tmp_path, [b"a"]).run("http://localhost/predict", 1, 1)
