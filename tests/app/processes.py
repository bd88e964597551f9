"""The service as processes: real sockets, real signals, its log line by line."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parent.parent.parent
# Settings of a server that compiles nothing and measures little.
LIGHT: Any = {"backend": "torch", "precision": "float32", "instances": "1", "max_batch_size": "1"}


@dataclass
class Server:
    process: subprocess.Popen[str]
    lines: "SimpleQueue[str | None]" = field(default_factory=SimpleQueue)
    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    """Every log line read so far."""
    text: list[str] = field(default_factory=list)
    """Those that are no JSON: what a crash leaves."""

    def event(self, name: str) -> dict[str, Any]:
        """The next log line of that event."""
        while (line := self.lines.get(timeout=60)) is not None:
            if not line.startswith("{"):
                self.text.append(line)
                continue
            record: dict[str, Any] = json.loads(line)
            self.seen.append(record)
            if record["event"] == name:
                return record
        pytest.fail(f"the server ended without {name!r}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


# Of a server for which every batch size pays, on any machine.
_GAIN = "import service.execution.tuning as tuning; tuning.gain = lambda *_: 2.0"
LARGE_BATCHES = ("-c", f"{_GAIN}; from app import __main__ as app; app.main(app.Starting())")


@contextmanager
def serving(
    *,
    environment: Mapping[str, str] | None = None,
    read_log: bool = True,
    command: Sequence[str] = ("-m", "app"),
    prefix: Sequence[str] = (),
    **settings: str,
) -> Iterator[Server]:
    """A server on a free port, with `settings` as in `PVT_*`; without `read_log`, its log is read until it listens.

    `prefix` is a command that becomes the server, such as one that enters a cgroup first.
    """
    variables = {"PVT_PORT": "0", **{f"PVT_{name.upper()}": value for name, value in settings.items()}}
    environment = {**os.environ, **variables, **(environment or {})}
    with subprocess.Popen(
        [*prefix, sys.executable, *command], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        server = Server(process)

        def read() -> None:
            assert process.stderr
            for line in process.stderr:
                server.lines.put(line)
                if not read_log and '"event":"listening"' in line:
                    break
            server.lines.put(None)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            server.url = server.event("listening")["url"]
            yield server
        finally:
            process.kill()
            reader.join()


def post(url: str, files: list[tuple[str, bytes]]) -> httpx.Response:
    return httpx.post(f"{url}/predict", files=files, timeout=60)
