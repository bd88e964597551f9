"""Several worker processes on one socket: starts them, replaces those that end or hang, stops them all."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import structlog
from prometheus_client import CollectorRegistry, Counter

from app.settings import Settings
from app.workers.group import REPORT_SECONDS, WorkerGroup
from service.machine import usable_cores

log = structlog.get_logger(component="supervisor")

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 30.0
STEADY_SECONDS = 60.0  # a worker that ran for longer ended for a new reason
OVERTIME_SECONDS = 10.0  # beyond PVT_SHUTDOWN_SECONDS, for a worker that does not end
STARTUP_FAILURE = 3  # uvicorn's exit code
_ROOT = Path(__file__).parent.parent.parent


def run(settings: Settings, listener: socket.socket) -> int:
    """Serve on `listener` with `settings.workers` processes until a signal stops it; returns the exit code."""
    with TemporaryDirectory(prefix="pvt-serve-") as name:
        group = WorkerGroup(Path(name), settings.workers)
        group.share_metrics("supervisor")
        return asyncio.run(Supervisor(settings, listener, group).run())


class Supervisor:
    """Keeps one process running for each number of `group`.

    All share the listening socket, so a connection waits for any worker that is free, and one that waits when a worker
    dies is taken by another. The write end of a pipe that each worker watches is held open by this process: its end,
    because this process closes it or dies, makes them finish what is under way and stop.
    """

    def __init__(self, settings: Settings, listener: socket.socket, group: WorkerGroup) -> None:
        self._settings = settings
        self._listener = listener
        self._group = group
        self._restarts = Counter(
            "pvt_worker_restarts", "Worker processes that ended and were replaced.", registry=CollectorRegistry()
        )
        self._stop_pipe, self._held = os.pipe()
        # Mutable state: the processes by number, whether all were up once, whether they are to stop, and the exit code.
        self._processes: dict[int, Process] = {}
        self._all_up = False
        self._stopping = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        """Start the workers and return when the last has ended."""
        for sig in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(sig, self._on_signal, sig)
        tasks = asyncio.create_task(self._announce()), asyncio.create_task(self._kill_silent())
        try:
            await asyncio.gather(*(self._keep(worker) for worker in range(self._group.size)))
        finally:
            for task in tasks:
                task.cancel()
            os.close(self._stop_pipe)
        return self._code

    def _on_signal(self, sig: int) -> None:
        if not self._stopping.is_set():
            log.info("draining", signal=signal.Signals(sig).name)
            self._stop()
            return
        self._send(signal.SIGTERM)  # a worker that drains stops at once

    def _stop(self) -> None:
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._listener.close()  # the last worker to close its own must find nobody else holding it
        os.close(self._held)
        wait = self._settings.shutdown_seconds + OVERTIME_SECONDS
        asyncio.get_running_loop().call_later(wait, self._send, signal.SIGKILL)

    def _send(self, sig: signal.Signals) -> None:
        for worker, process in self._processes.items():
            if sig == signal.SIGKILL:
                log.error("worker_killed", worker=worker)
            with suppress(ProcessLookupError):
                process.send_signal(sig)

    async def _announce(self) -> None:
        """Log where it listens once every worker is up."""
        workers = range(self._group.size)
        while not all(reports := [self._group.last_report(worker) for worker in workers]):  # noqa: ASYNC110
            await asyncio.sleep(REPORT_SECONDS / 20)
        self._all_up = True
        host, port = self._listener.getsockname()[:2]
        instances = sum(report.instances for report in reports if report)
        log.info(
            "listening", url=f"http://{host}:{port}", workers=len(workers), instances=instances, cores=usable_cores()
        )

    async def _kill_silent(self) -> None:
        """Kill each worker that has not reported for PVT_STALL_SECONDS: one that is stopped, or whose loop hangs."""
        while not self._stopping.is_set():
            looked = monotonic()
            await asyncio.sleep(REPORT_SECONDS)
            if monotonic() - looked > 2 * REPORT_SECONDS:
                continue  # this process was stopped too, a container that was paused for one: the workers report next
            for worker, process in self._processes.items():
                report = self._group.last_report(worker)
                if report and report.silent_seconds() > self._settings.stall_seconds and process.returncode is None:
                    log.error("worker_silent", worker=worker, seconds=round(monotonic() - report.at))
                    process.kill()

    async def _keep(self, worker: int) -> None:
        delay = FIRST_DELAY_SECONDS
        while not self._stopping.is_set():
            started = monotonic()
            process = self._processes[worker] = await self._start(worker)
            code = await process.wait()
            del self._processes[worker]
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
        listener, folder = self._listener.fileno(), str(self._group.folder)
        arguments = [worker, self._group.size, folder, listener, self._stop_pipe]
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # a module `app` in the current folder is another application
            "-m",
            "app.workers",
            *map(str, arguments),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=(listener, self._stop_pipe),
            start_new_session=True,  # else Ctrl-C would reach it twice, from the terminal and from here
        )
