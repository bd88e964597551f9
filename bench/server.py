"""Servers as processes to be measured: started, asked until they answer, stopped with all that they started."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

import httpx
import psutil

from bench.bodies import Body, bodies
from bench.peers import OURS, Contender

ROOT = Path(__file__).parent.parent
START_SECONDS = 120.0
STOP_SECONDS = 20.0
_SETTLING = 3  # requests, one after the other
_NOT_YET = (404, 429, 502, 503)  # what a server may answer while its model or its route is on the way


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; `started` is when its process was, on `perf_counter`."""

    url: str
    process: "subprocess.Popen[bytes]"
    started: float
    log: Path

    def post(self, body: Body) -> None:
        """Post `body`; raises httpx.HTTPStatusError when it is not answered with 200."""
        headers = {"Content-Type": body.content_type}
        httpx.post(self.url, content=body.data, headers=headers, timeout=60).raise_for_status()

    def wait(self, body: Body) -> float:
        """Post `body` until it is answered, and return the seconds since the process started.

        Raises:
            RuntimeError: the process ended, or did not answer in time; with the end of its log.
        """
        while perf_counter() < self.started + START_SECONDS and self.process.poll() is None:
            try:
                self.post(body)
                return perf_counter() - self.started
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in _NOT_YET:
                    raise RuntimeError(f"it answers {error.response.status_code}: {error.response.text}") from error
            except httpx.HTTPError:
                pass
            sleep(0.02)
        tail = self.log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"it ended with {self.process.poll()} or gave no answer in {START_SECONDS:g} s:\n{tail}")

    def settle(self, body: Body) -> None:
        """Return when nothing is left of the load before: what is posted now is answered after it."""
        for _ in range(_SETTLING):
            self.post(body)

    def resident_bytes(self) -> int:
        """Resident memory of the process and all that it started; pages that they share count for each."""
        return sum(process.memory_info().rss for process in self._tree())

    def cpu_seconds(self) -> float:
        """Processor time used so far by the process and all that it started."""
        times = [process.cpu_times() for process in self._tree()]
        return float(sum(t.user + t.system for t in times))

    def stop(self) -> None:
        """End the process as its user would, then by force whatever is left of what it started."""
        tree = self._tree()
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@contextmanager
def serving(
    contender: Contender, folder: Path, store: Path, settings: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`contender` on a free port of the loopback interface, with its log in `folder`.

    `store` holds the model that ours serves, or that our graph comes from; `settings` are environment variables.
    """
    port = _free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PVT_PORT": str(port), "PVT_MODEL_STORE": str(store)}
    environment["PVT_CACHE_DIR"] = str(folder / "plans")  # measured here, not at some other time
    log = folder / f"{contender.name}.log"
    started = perf_counter()
    with (
        log.open("wb") as output,
        subprocess.Popen(
            contender.argv(port, str(store)),
            cwd=ROOT,
            env={**environment, **dict(contender.environment), **(settings or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        server = Server(f"http://127.0.0.1:{port}{contender.path}", process, started, log)
        try:
            yield server
        finally:
            server.stop()


def start_figures(image: bytes, folder: Path, times: int) -> list[tuple[float, float]]:
    """Seconds from process start to the first prediction and megabytes then, of our server with the embedded model."""
    figures = []
    (body,) = bodies([image], OURS.form)
    for _ in range(times):
        with serving(OURS, folder, ROOT / "model_store") as server:
            figures.append((server.wait(body), server.resident_bytes() / 1e6))
    return figures


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
