import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.bodies import Body, bodies
from bench.http_overhead import FORMS
from bench.load import Wrk, parse
from bench.results import Closed
from tests.app.processes import serving

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


def test_a_report_of_wrk_is_read() -> None:
    load = parse(REPORT, 8)

    assert load == Closed(clients=8, images_per_second=204.32, p50_ms=38.83, p99_ms=1250.0, requests=821, failed=13)


def test_a_report_of_another_shape_is_shown() -> None:
    with pytest.raises(RuntimeError, match="nonsense"):
        parse("nonsense", 1)


def test_wrk_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(RuntimeError, match="wrk is missing; install it"):
        Wrk(tmp_path, [Body("image/jpeg", b"a")]).run("http://localhost/predict", 1, 1)


@pytest.mark.skipif(not shutil.which("wrk") and not os.environ.get("CI"), reason="needs wrk; CI has it")
def test_the_service_answers_what_wrk_sends(digits: Path, tmp_path: Path) -> None:
    """A request without a Host is refused, and wrk sends none unless its script knows it."""
    images = [(digits / f"{name}.png").read_bytes() for name in ("one", "two")]
    with serving(read_log=False, backend="torch", max_batch_size="1") as server:
        for form in FORMS:
            load = Wrk(tmp_path / form, bodies(images, form)).run(f"{server.url}/predict", 2, 1)

            assert load.requests > 0
            assert load.failed == 0


def test_wrk_is_given_each_body_and_their_content_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> object:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=REPORT)

    monkeypatch.setattr(subprocess, "run", run)

    Wrk(tmp_path / "new", bodies([b"one", b"two"], "multipart")).run("http://localhost/predict", 8, 4)

    script = (tmp_path / "new" / "post.lua").read_text()
    assert "-c8" in commands[0]
    assert "multipart/form-data; boundary=" in script
    assert [b"one" in (tmp_path / "new" / "0.body").read_bytes(), "1.body" in script] == [True, True]
