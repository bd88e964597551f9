"""Logs are set up once a process, so each case has one of its own."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import httpx
import pytest

from app import logs
from app.logs import LogWriter, console_renderer
from tests.app.processes import serving

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import logging, structlog
from app import logs
logs.configure({log_format!r})
structlog.get_logger(component="test").info("ours", number=1, path="a\\nb")
logging.getLogger("theirs").warning("hello %s", "you")
try:
    1 / 0
except ZeroDivisionError:
    structlog.get_logger(component="test").exception("failed")
"""


def written(log_format: str) -> list[str]:
    script = SCRIPT.format(log_format=log_format)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_every_line_is_one_json_object_whoever_wrote_it() -> None:
    ours, theirs, failed = (json.loads(line) for line in written("json"))

    assert (ours["event"], ours["component"], ours["level"], ours["path"]) == ("ours", "test", "info", "a\nb")
    assert (theirs["event"], theirs["logger"], theirs["level"]) == ("hello you", "theirs", "warning")
    assert (failed["level"], failed["exception"][0]["exc_type"]) == ("error", "ZeroDivisionError")
    assert all("timestamp" in line for line in (ours, theirs, failed))


def test_people_get_text() -> None:
    lines = written("console")

    assert "ours" in lines[0]
    assert "number=1" in lines[0]
    assert "hello you" in lines[1]
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_without_a_choice_a_pipe_gets_json() -> None:
    assert all(json.loads(line) for line in written("auto"))


@pytest.mark.parametrize(("level", "events"), [("warning", []), ("info", ["request"])])
def test_lines_below_the_level_are_left_out(level: str, events: list[str]) -> None:
    script = """
import logging, structlog
from app import logs
logs.configure("json", level=LEVEL)
structlog.get_logger().info("request")
structlog.get_logger().warning("slow")
logging.getLogger("library").info("request")
logging.getLogger("library").debug("detail")
logging.getLogger("watchfiles").info("change")
logging.getLogger("library").warning("trouble")
""".replace("LEVEL", repr(level))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    found = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert found == [*events, "slow", *events, "trouble"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/docs"]),
        ("http://0.0.0.0:80", ["http://127.0.0.1:80", "http://127.0.0.1:80/", "http://127.0.0.1:80/docs"]),
        ("http://[::]:80", ["http://[::1]:80", "http://[::1]:80/", "http://[::1]:80/docs"]),
        ("unix:/run/pvt.sock", ["unix:/run/pvt.sock"]),
    ],
)
def test_the_first_event_on_a_terminal_is_what_to_open(url: str, expected: list[str]) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    rendered = console_renderer(Terminal())(None, "info", {"event": "listening", "level": "info", "url": url})
    elsewhere = console_renderer(StringIO())(None, "info", {"event": "listening", "level": "info", "url": url})

    assert re.findall(r"(?:http|unix):\S+", str(rendered)) == expected
    assert str(elsewhere).count("\n") == 0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def test_lines_come_out_whole_and_in_order(pipe: tuple[int, int]) -> None:
    read, write = pipe
    writer = LogWriter(write)
    for number in range(100):
        writer.write(str(number))
    writer.flush()

    assert os.read(read, 65536).split() == [b"%d" % number for number in range(100)]


def test_the_standard_librarys_records_come_out_too(pipe: tuple[int, int]) -> None:
    read, write = pipe
    handler = LogWriter(write)
    handler.handle(logging.makeLogRecord({"msg": "hello %s", "args": ("you",)}))
    handler.flush()

    assert os.read(read, 65536) == b"hello you\n"


def test_a_file_that_takes_nothing_costs_bounded_memory_and_dropped_lines_are_counted(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING_BYTES", 200_000)
    read, write = pipe
    writer = LogWriter(write)
    for _ in range(500):
        writer.write("x" * 999)

    written = b""
    while b"lines_dropped" not in written:
        written += os.read(read, 65536)

    assert written.count(b"x" * 999 + b"\n") == 200
    assert b'"lines":300' in written


@pytest.mark.parametrize("end", ["", "sys.exit(1)", "raise ValueError", "logging.shutdown(); os._exit(0)"])
def test_no_line_is_lost_at_exit(end: str) -> None:
    script = f"""
import logging, os, sys, structlog
from app import logs
logs.configure("json")
for number in range(1000):
    structlog.get_logger().info("line", number=number)
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.stderr.count('"event":"line"') == 1000


def test_requests_are_answered_though_nobody_reads_the_log() -> None:
    with serving(read_log=False) as server:
        headers = {"X-Request-ID": "x" * 128}
        with httpx.Client(timeout=60) as client:
            statuses = {client.get(f"{server.url}/{'n' * 1000}", headers=headers).status_code for _ in range(200)}

        assert statuses == {404}
        assert server.stop() == 0
