"""The process that keeps several workers running on one socket."""

import asyncio
import os
import signal
import socket
import stat
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from time import monotonic, time

import structlog
from prometheus_client import CollectorRegistry, Counter

from app import systemd
from app.listening import url_of
from app.settings import Settings
from app.workers import OVERTIME_SECONDS, REPORT_SECONDS, Report, WorkerGroup
from service.awake import AwakeClock
from service.machine import usable_cores

log = structlog.get_logger(component="supervisor")

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 30.0
STEADY_SECONDS = 60.0  # a worker that ran for longer ended for a new reason
START_SECONDS = (
    120.0  # in which a process writes its first report; importing torch from a cold disk takes half a minute
)
STUCK_SECONDS = 10.0  # in which a worker that is stuck ends itself, so that its clients get an answer
STARTUP_FAILURE = 3  # uvicorn's exit code
OLD_SECONDS = 10.0  # a folder younger than that may be one that is not locked yet
FOLDER_PREFIX = "pvt-serve-"
_ROOT = Path(__file__).parent.parent


class NoTemporaryFolder(Exception):
    """The workers have no folder to share; the message says why, and what helps."""


def supervise(settings: Settings, listeners: Sequence[socket.socket]) -> int:
    """Serve on `listeners` with `settings.workers` processes until a signal stops it; returns the exit code.

    Raises:
        NoTemporaryFolder: no folder for temporary files can be written to.
    """
    try:
        _remove_old_folders()
        group = WorkerGroup(Path(mkdtemp(prefix=FOLDER_PREFIX)), settings.workers)
    except OSError as error:
        raise NoTemporaryFolder(
            f"several workers share a folder for temporary files, and none can be made: {error.strerror or error}; "
            "mount one (docker run --tmpfs /tmp, an emptyDir in Kubernetes), name one in TMPDIR, or set PVT_WORKERS=1"
        ) from error
    with group.folder_in_use():
        group.share_metrics("supervisor")
        return asyncio.run(Supervisor(settings, listeners, group).run())


def _remove_old_folders() -> None:
    """Remove what services have left whose processes were all killed at once."""
    for folder in Path(gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):
            found = folder.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            if ours and time() - found.st_mtime > OLD_SECONDS:
                WorkerGroup(folder, 0).remove_unused()


@dataclass(eq=False, slots=True)
class _Child:
    """The process of a worker, its start, and since when it has reported that it is stuck; on `monotonic`."""

    process: Process
    started: float
    stuck_at: float | None = None


class Supervisor:
    """Keeps one process running for each number of `group`.

    All share the listening sockets, so a connection waits for any worker that is free, and one that waits when a worker
    dies is taken by another. The write end of a pipe that each worker watches is held open by this process: its end,
    because this process closes it or dies, makes them finish what is under way and stop.
    """

    def __init__(self, settings: Settings, listeners: Sequence[socket.socket], group: WorkerGroup) -> None:
        self._settings = settings
        self._listeners = listeners
        self._group = group
        self._restarts = Counter(
            "pvt_worker_restarts", "Worker processes that ended and were replaced.", registry=CollectorRegistry()
        )
        self._stop_pipe, self._held = os.pipe()
        self._url = url_of(listeners[0])
        self._clock = AwakeClock(REPORT_SECONDS)
        # Mutable state: the processes by number, whether all were up once, whether they are to stop, and the exit code.
        self._children: dict[int, _Child] = {}
        self._all_up = False
        self._stopping = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        """Start the workers and return when the last has ended."""
        for sig in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(sig, self._on_signal, sig)
        tasks = asyncio.create_task(self._announce()), asyncio.create_task(self._kill_hanging())
        try:
            await asyncio.gather(*(self._keep(worker) for worker in range(self._group.size)))
        finally:
            for task in tasks:
                task.cancel()
            os.close(self._stop_pipe)
        return self._code

    def _on_signal(self, sig: int) -> None:
        if self._stopping.is_set():
            self._send(signal.SIGTERM)  # a worker that drains stops at once
        else:
            log.info("draining", signal=signal.Signals(sig).name)
            if sig == signal.SIGINT:  # one byte for each worker; its end alone means SIGTERM
                os.write(self._held, bytes(self._group.size))
            self._stop()

    def _stop(self) -> None:
        if self._stopping.is_set():
            return
        self._stopping.set()
        systemd.notify("STOPPING=1")
        for listener in self._listeners:
            listener.close()  # the last worker to close its own must find nobody else holding it
        os.close(self._held)
        wait = self._settings.exit_seconds + OVERTIME_SECONDS
        asyncio.get_running_loop().call_later(wait, self._send, signal.SIGKILL)

    def _send(self, sig: signal.Signals) -> None:
        for worker, child in self._children.items():
            if sig == signal.SIGKILL:
                log.error("worker_killed", worker=worker)
            with suppress(ProcessLookupError):
                child.process.send_signal(sig)

    async def _announce(self) -> None:
        """Log where it listens once every worker is up."""
        size = self._group.size
        while not all(reports := [self._group.last_report(worker) for worker in range(size)]):  # noqa: ASYNC110
            await asyncio.sleep(REPORT_SECONDS / 20)
        self._all_up = True
        self._note_if_ready(reports)
        instances = sum(report.instances for report in reports if report)
        log.info("listening", url=self._url, workers=size, instances=instances, cores=usable_cores())
        systemd.notify("READY=1")

    def _note_if_ready(self, reports: Sequence[Report | None]) -> None:
        if all(report and report.ready for report in reports):
            self._group.note_ready()

    async def _kill_hanging(self) -> None:
        """Kill each worker that hangs: it is stopped, or its loop or a thread hangs for PVT_STALL_SECONDS."""
        while not self._stopping.is_set():
            await asyncio.sleep(REPORT_SECONDS)
            self._clock.tick()
            systemd.notify_watchdog()
            reports = [self._group.last_report(worker) for worker in range(self._group.size)]
            self._note_if_ready(reports)
            for worker, child in self._children.items():
                if child.process.returncode is None:
                    self._kill_if_hanging(worker, child, reports[worker])

    def _kill_if_hanging(self, worker: int, child: _Child, report: Report | None) -> None:
        stall = self._settings.stall_seconds
        if report is None:
            if (seconds := self._clock.since(child.started)) < max(stall, START_SECONDS):
                return
            log.error("worker_silent", worker=worker, seconds=round(seconds))
        elif report.silent_seconds(self._clock) > stall:
            log.error("worker_silent", worker=worker, seconds=round(self._clock.since(report.at)))
        elif report.live:
            child.stuck_at = None
            return
        else:
            if child.stuck_at is None:
                child.stuck_at = monotonic()
            if self._clock.since(child.stuck_at) < STUCK_SECONDS:
                return  # it ends itself: see `app/watchdog.py`
            log.error("worker_stuck", worker=worker, reasons=report.reasons)
        child.process.kill()

    async def _keep(self, worker: int) -> None:
        """Start the process of `worker`, and another when it ends, until all are to stop."""
        delay = FIRST_DELAY_SECONDS
        while not self._stopping.is_set():
            started = monotonic()
            process = await self._start(worker)
            self._children[worker] = _Child(process, started)
            code = await process.wait()
            del self._children[worker]
            self._group.forget(worker)
            if self._stopping.is_set():
                return
            if code == STARTUP_FAILURE and not self._all_up:
                self._code = code
                self._stop()
                return
            if monotonic() - started > STEADY_SECONDS:
                delay = FIRST_DELAY_SECONDS
            self._restarts.inc()
            log.error("worker_ended", worker=worker, exit_code=code, again_in_seconds=delay)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)

    async def _start(self, worker: int) -> Process:
        listeners = [listener.fileno() for listener in self._listeners]
        arguments = map(str, (worker, self._group.size, self._group.folder, self._stop_pipe, *listeners))
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # -P: a module `app` in the current folder is another application.
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "app", "--as-worker", *arguments),
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=(*listeners, self._stop_pipe),
            start_new_session=True,  # else Ctrl-C would reach it twice, from the terminal and from here
        )
