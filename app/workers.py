"""Several worker processes on one socket: the supervisor that keeps them running, one worker, and what all share.

They share a private folder with their reports and metrics. A worker is known by its number, not by its process: the one
that replaces a dead one goes on with its counters, so that no sum ever goes backwards.
"""

import asyncio
import ctypes
import logging
import math
import os
import shutil
import signal
import socket
import stat
import sys
import threading
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from time import monotonic, sleep, time
from typing import TYPE_CHECKING

import psutil
import structlog
from prometheus_client import CollectorRegistry, Counter, Metric, PlatformCollector, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field, ValidationError

from app.listening import url_of
from app.settings import Settings
from service.files import atomic_write, locked
from service.machine import share, usable_cores

if TYPE_CHECKING:  # they import torch, which the supervisor does not need
    from app.stats import Share
    from service.engine import Engine
    from service.options import EngineOptions
    from service.results import Health

log = structlog.get_logger(component="supervisor")

REPORT_SECONDS = 1.0
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 30.0
STEADY_SECONDS = 60.0  # a worker that ran for longer ended for a new reason
OVERTIME_SECONDS = 3.0  # beyond PVT_SHUTDOWN_SECONDS, for a worker that does not end
START_SECONDS = (
    120.0  # in which a process writes its first report; importing torch from a cold disk takes half a minute
)
STARTUP_FAILURE = 3  # uvicorn's exit code
OLD_SECONDS = 10.0  # a folder younger than that may be one that is not locked yet
FOLDER_PREFIX, LOCK = "pvt-serve-", "lock"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_ROOT = Path(__file__).parent.parent


class Report(BaseModel):
    """A worker's health, how many batches it runs at a time, and when it wrote so, on the machine's monotonic clock.

    `starting`: its process has not been ready yet.
    """

    live: bool
    ready: bool
    reasons: list[str]
    starting: bool = False
    instances: int = 0
    at: float = Field(default_factory=monotonic)

    def silent_seconds(self) -> float:
        """How long ago it was written, beyond the time in which the next one was due."""
        return monotonic() - self.at - 2 * REPORT_SECONDS


_STARTING = Report(live=True, ready=False, reasons=["starting"], starting=True, at=math.inf)  # never silent


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """`size` workers, numbered from 0, and the folder they share."""

    folder: Path
    size: int

    def report_file(self, worker: int) -> Path:
        """Where `worker` writes its reports."""
        return self.folder / f"worker{worker}.json"

    def share_file(self, worker: int) -> Path:
        """Where `worker` writes what `GET /stats` shows of it."""
        return self.folder / f"stats{worker}.json"

    def last_report(self, worker: int) -> Report | None:
        """The last report of `worker`; None when its process has written none since it started."""
        try:
            return Report.model_validate_json(self.report_file(worker).read_bytes())
        except (OSError, ValidationError):
            return None

    @property
    def was_ready(self) -> bool:
        """Whether all workers have been ready at once."""
        return self._ready_file.exists()

    def note_ready(self) -> None:
        """Call it when all workers are ready."""
        self._ready_file.touch()

    @property
    def _ready_file(self) -> Path:
        return self.folder / "ready"

    @contextmanager
    def folder_in_use(self) -> Iterator[None]:
        """Hold the folder; the process that leaves it last, which may outlive the supervisor, removes it."""
        with locked(self.folder / LOCK, shared=True):
            yield
        self.remove_unused()

    def remove_unused(self) -> None:
        """Remove the folder unless a process holds it, or another one is just removing it."""
        if (self.folder / LOCK).exists():
            with suppress(OSError), locked(self.folder / LOCK, wait=False):
                shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self, worker: int) -> None:
        """Call it when the process of `worker` has ended, before another replaces it."""
        self.report_file(worker).unlink(missing_ok=True)
        self.share_file(worker).unlink(missing_ok=True)
        mark_process_dead(worker, str(self.folder))  # type: ignore[no-untyped-call]  # drops its gauges; its counters stay

    def share_metrics(self, identifier: str) -> None:
        """Keep the values of all metrics that this process makes from now on where the whole group can read them."""
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.folder)
        values.ValueClass = values.MultiProcessValue(lambda: identifier)  # type: ignore[no-untyped-call]

    def registry(self, supervisor: int) -> CollectorRegistry:
        """The sums over all workers and the process `supervisor`, their parent."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self.folder))  # type: ignore[no-untyped-call]
        registry.register(_ProcessesCollector(supervisor))
        PlatformCollector(registry=registry)
        return registry


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker number `index` of `group`; the end of the pipe `stop_pipe` is its signal to stop."""

    group: WorkerGroup
    index: int
    stop_pipe: int

    def share_of(self, options: "EngineOptions") -> "EngineOptions":
        """`options` with this worker's share of instances, cores and memory."""
        instances, cores = (share(total, self.index, self.group.size) for total in (options.instances, options.cores))
        bound = options.budget.bytes
        budget = replace(options.budget, bytes=None if bound is None else bound // self.group.size)
        # A process that runs fewer batches at a time than there are GPUs would leave some of them unused.
        instances = max(instances, len(options.devices))
        memory, cache = options.memory_bytes // self.group.size, options.cache_bytes // self.group.size
        options = replace(options, memory_bytes=memory, cache_bytes=cache)
        return replace(options, instances=instances, cores=cores, budget=budget)

    def health(self, own: "Health", stall_seconds: float) -> "Health":
        """`own` and that of the other workers combined: a client reaches any of them, and means the service.

        A worker that is silent for `stall_seconds` is neither live nor ready. One that starts makes the others unready
        only until all have been ready once.
        """
        reports = [self.group.last_report(each) or _STARTING for each in range(self.group.size)]
        reports[self.index] = Report(**asdict(own), starting=reports[self.index].starting and not own.ready)
        for worker, report in enumerate(reports):
            if report.silent_seconds() > stall_seconds:
                reason = f"has not reported for {monotonic() - report.at:.0f} s"
                reports[worker] = Report(live=False, ready=False, reasons=[reason])
        # Others serve in the place of one that starts again. At the first start, all are waited for.
        counted = [each for each in reports if not (each.starting and self.group.was_ready)]
        ready = bool(counted) and all(each.ready for each in counted)
        reasons = [
            reason if worker == self.index else f"worker {worker}: {reason}"
            for worker, report in enumerate(reports)
            for reason in report.reasons
        ]
        return replace(own, live=all(each.live for each in reports), ready=ready, reasons=reasons)

    @asynccontextmanager
    async def reporting(
        self, engine: "Engine", own: "Callable[[], Share]", collect: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Report each second, and stop when the supervisor closes the pipe.

        `own` is this worker's share of the stats; `collect` brings its gauges up to date.
        """

        async def keep_reporting() -> None:
            while True:
                await asyncio.sleep(REPORT_SECONDS)
                await self._report(engine, own, collect)

        with self.group.folder_in_use():
            await self._report(engine, own, collect)
            task = asyncio.create_task(keep_reporting())
            try:
                yield
            finally:
                task.cancel()

    def watch(self, exit_seconds: float) -> None:
        """From a thread of its own: stop when the supervisor closes the pipe or dies, at the latest when time is up.

        A process that is stopped (SIGSTOP) goes on when its supervisor dies: nobody else would ever let it end.
        """

        def stop() -> None:
            interrupted = os.read(self.stop_pipe, 1)
            os.kill(os.getpid(), signal.SIGINT if interrupted else signal.SIGTERM)
            sleep(exit_seconds + OVERTIME_SECONDS)
            # Only a process whose event loop hangs is still there.
            structlog.get_logger(component="worker").error("worker_killed", worker=self.index)
            logging.shutdown()
            os._exit(1)

        threading.Thread(target=stop, name="stop", daemon=True).start()
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)

    def shares(self, own: "Callable[[], Share]") -> "list[Share]":
        """`own`, and what the other workers wrote last."""
        shares = [own()]
        for worker in {*range(self.group.size)} - {self.index}:
            with suppress(OSError, ValidationError):  # it starts, or ends
                shares.append(type(shares[0]).model_validate_json(self.group.share_file(worker).read_bytes()))
        return shares

    async def _report(self, engine: "Engine", own: "Callable[[], Share]", collect: Callable[[], None]) -> None:
        collect()
        health = await engine.health()
        before = self.group.last_report(self.index) or _STARTING
        starting = before.starting and not health.ready
        report = Report(**asdict(health), starting=starting, instances=engine.options.instances)
        atomic_write(self.group.report_file(self.index), report.model_dump_json())
        atomic_write(self.group.share_file(self.index), own().model_dump_json())


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
        # Mutable state: the processes by number, each with its start, whether all were up once, whether they are to
        # stop, and the exit code.
        self._processes: dict[int, tuple[Process, float]] = {}
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
        for listener in self._listeners:
            listener.close()  # the last worker to close its own must find nobody else holding it
        os.close(self._held)
        wait = self._settings.exit_seconds + OVERTIME_SECONDS
        asyncio.get_running_loop().call_later(wait, self._send, signal.SIGKILL)

    def _send(self, sig: signal.Signals) -> None:
        for worker, (process, _) in self._processes.items():
            if sig == signal.SIGKILL:
                log.error("worker_killed", worker=worker)
            with suppress(ProcessLookupError):
                process.send_signal(sig)

    async def _announce(self) -> None:
        """Log where it listens once every worker is up."""
        size = self._group.size
        while not all(reports := [self._group.last_report(worker) for worker in range(size)]):  # noqa: ASYNC110
            await asyncio.sleep(REPORT_SECONDS / 20)
        self._all_up = True
        self._note_if_ready(reports)
        instances = sum(report.instances for report in reports if report)
        log.info("listening", url=self._url, workers=size, instances=instances, cores=usable_cores())

    def _note_if_ready(self, reports: Sequence[Report | None]) -> None:
        if all(report and report.ready for report in reports):
            self._group.note_ready()

    async def _kill_hanging(self) -> None:
        """Kill each worker that hangs: it is stopped, or its loop or a thread hangs for PVT_STALL_SECONDS."""
        while not self._stopping.is_set():
            looked = monotonic()
            await asyncio.sleep(REPORT_SECONDS)
            if monotonic() - looked > 2 * REPORT_SECONDS:
                continue  # this process was stopped too, a container that was paused for one: the workers report next
            reports = [self._group.last_report(worker) for worker in range(self._group.size)]
            self._note_if_ready(reports)
            for worker, (process, started) in self._processes.items():
                if process.returncode is None:
                    self._kill_if_hanging(worker, process, reports[worker], started)

    def _kill_if_hanging(self, worker: int, process: Process, report: Report | None, started: float) -> None:
        stall = self._settings.stall_seconds
        if report is None:
            if monotonic() - started < max(stall, START_SECONDS):
                return
            log.error("worker_silent", worker=worker, seconds=round(monotonic() - started))
        elif report.silent_seconds() > stall:
            log.error("worker_silent", worker=worker, seconds=round(monotonic() - report.at))
        elif not report.live:
            log.error("worker_stuck", worker=worker, reasons=report.reasons)
        else:
            return
        process.kill()

    async def _keep(self, worker: int) -> None:
        """Start the process of `worker`, and another when it ends, until all are to stop."""
        delay = FIRST_DELAY_SECONDS
        while not self._stopping.is_set():
            started = monotonic()
            process = await self._start(worker)
            self._processes[worker] = process, started
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


class _ProcessesCollector(Collector):
    """Process metrics, under the names that a single process gives its own, as sums over `parent` and its children."""

    def __init__(self, parent: int) -> None:
        self._parent = psutil.Process(parent)

    def collect(self) -> Iterable[Metric]:
        """See `Collector.collect`; nothing while the parent is gone."""
        with suppress(psutil.NoSuchProcess):
            cpu, resident, files = self._sums()
            started = self._parent.create_time()
            yield CounterMetricFamily("process_cpu_seconds", "Processor time of all processes of the service.", cpu)
            shared = "Their resident memory; pages that several share count for each."
            yield GaugeMetricFamily("process_resident_memory_bytes", shared, resident)
            yield GaugeMetricFamily("process_open_fds", "Their open file descriptors.", files)
            yield GaugeMetricFamily("process_start_time_seconds", "When the service started, since the epoch.", started)

    def _sums(self) -> tuple[float, int, int]:
        """Processor seconds, bytes and descriptors; those of children that ended earlier count as their parent's."""
        while True:
            children = self._parent.children()
            try:
                cpu = sum(sum(child.cpu_times()[:2]) for child in children) + sum(self._parent.cpu_times()[:4])
                resident = sum(each.memory_info().rss for each in (self._parent, *children))
                files = sum(each.num_fds() for each in (self._parent, *children))
            except psutil.NoSuchProcess:
                if not self._parent.is_running():
                    raise
            else:
                if self._parent.children() == children:  # else one may have been counted twice or not at all
                    return cpu, resident, files
