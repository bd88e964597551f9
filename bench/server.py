"""Our own server as a process to be measured."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import httpx
import psutil

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; `started` is when its process was, on `perf_counter`."""

    url: str
    process: "subprocess.Popen[str]"
    started: float

    def first_prediction(self, picture: bytes) -> float:
        """Seconds from process start to the answer to `picture`."""
        self.predict(picture)
        return perf_counter() - self.started

    def predict(self, picture: bytes) -> None:
        """Post `picture`; raises httpx.HTTPStatusError when it is not answered."""
        headers = {"Content-Type": "application/octet-stream"}
        httpx.post(f"{self.url}/predict", content=picture, headers=headers, timeout=60).raise_for_status()

    def resident_bytes(self) -> int:
        """The process's resident memory."""
        resident: int = psutil.Process(self.process.pid).memory_info().rss
        return resident

    def cpu_seconds(self) -> float:
        """Processor time the process has used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def serving(**settings: str) -> Iterator[Server]:
    """A server on a free port, with `settings` as in `PVT_*`."""
    environment = {**os.environ, "PVT_PORT": "0", **{f"PVT_{name.upper()}": value for name, value in settings.items()}}
    started = perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "app"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = _url(process)
            threading.Thread(target=process.communicate, daemon=True).start()  # a full pipe would stop the server
            yield Server(url, process, started)
        finally:
            process.terminate()
            process.wait()


def _url(process: "subprocess.Popen[str]") -> str:
    """Where it listens, by its own log."""
    seen = []
    for line in process.stderr or ():
        seen.append(line)
        record = json.loads(line) if line.startswith("{") else {}
        if record.get("event") == "listening":
            return str(record["url"])
    raise RuntimeError("the server did not start:\n" + "".join(seen))
