"""Logs are set up once a process, so each case has one of its own."""

import json
import subprocess
import sys
from pathlib import Path

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
