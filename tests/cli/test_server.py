import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import PvtServe
from tests.cli.terminals import on_terminal
from tests.conftest import ROOT
from tests.pvt_client.scripted import predicted, refused, scripted


def test_bench_reports_throughput_and_latency(pvt_serve: PvtServe, service_url: str, digits: Path) -> None:
    done = pvt_serve("bench", digits, "--url", service_url, "--seconds", "0.2", "--concurrency", "2", "--json")

    figures = json.loads(done.out)
    assert figures["images"] > 0
    assert figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"]
    assert (figures["concurrency"], figures["failed"], done.code) == (2, {}, 0)


def test_bench_sends_random_images_where_none_are_named(pvt_serve: PvtServe, service_url: str) -> None:
    done = pvt_serve("bench", "--url", service_url, "--seconds", "0.1")

    assert done.code == 0
    assert "images/s   p50" in done.lines[0]


def test_no_two_requests_carry_the_same_bytes(pvt_serve: PvtServe, digits: Path) -> None:
    with scripted(predicted()) as server:
        pvt_serve("bench", digits / "one.png", "--url", server.url, "--seconds", "0.1")

    bodies = [each.body for each in server.requests]
    assert len(set(bodies)) == len(bodies) > 1


def test_refused_requests_are_counted_and_not_tried_again(pvt_serve: PvtServe, digits: Path) -> None:
    with scripted(predicted(), predicted(), refused(429, Retry_After="0")) as server:
        done = pvt_serve("bench", digits, "--url", server.url, "--seconds", "0.1", "--concurrency", "1", "--json")

    figures = json.loads(done.out)
    assert (done.code, figures["images"]) == (3, 1)
    assert figures["failed"] == {"QueueFull": len(server.requests) - 2}


@pytest.mark.parametrize(("url", "code"), [("localhost:1", 1), ("ftp://localhost", 2)])
def test_a_service_that_is_not_there_is_one_line(pvt_serve: PvtServe, digits: Path, url: str, code: int) -> None:
    done = pvt_serve("bench", digits, "--url", url)

    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)


def test_serve_is_the_server_with_options_for_settings(service_url: str) -> None:
    assert not service_url.endswith(":1")  # which PVT_PORT names
    assert httpx.get(f"{service_url}/health").json() == {"live": True, "ready": True, "reasons": []}


def test_serve_that_pulls_on_demand_makes_the_user_s_store_first(tmp_path: Path) -> None:
    variables = {"HOME": str(tmp_path), "PVT_PULL": "on_demand", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", "serve", "--host", "256.0.0.1"]  # refused, so that it ends
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, "256.0.0.1" in done.stderr) == (2, True)
    assert (tmp_path / ".local/share/pvt-serve/model_store/pvt_v2_b0.digits/1/card.json").is_file()


def test_serve_on_a_terminal_says_what_to_open_and_logs_for_people() -> None:
    everywhere = "0.0.0.0"  # noqa: S104  what is opened then is this machine
    with on_terminal(
        "serve", "--port", "0", "--host", everywhere, NO_COLOR="1", PVT_BACKEND="torch", PVT_INSTANCES="1",
        PVT_MAX_BATCH_SIZE="1", PVT_URL="http://x",
    ) as server:  # fmt: skip
        server.until("stop it with Ctrl-C")
        page, docs = (re.search(rf"^  {name}  (http\S+)", server.seen, re.MULTILINE) for name in ("page", "docs"))
        assert page
        assert docs
        assert "pvt-serve" in httpx.get(page[1]).text
        assert "swagger" in httpx.get(docs[1]).text.lower()
        server.interrupt()
        assert server.ended() == 0

    assert "draining" in server.seen
    assert '{"' not in server.seen
    assert "\x1b" not in server.seen


def test_the_key_of_commands_locks_no_service(pvt_serve: PvtServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_KEY", "secret")

    done = pvt_serve("serve", "--port", "1")

    assert (done.code, done.err.count("\n"), "PVT_API_KEYS" in done.err) == (2, 1, True)
    assert "secret" not in done.err
