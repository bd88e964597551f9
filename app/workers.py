"""Several worker processes on one socket: the supervisor that keeps them running, one worker, and what all share.

They share a private folder with their reports and metrics. A worker is known by its number, not by its process: the one
that replaces a dead one goes on with its counters, so that no sum ever goes backwards.
"""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING

import psutil
import structlog
from prometheus_client import CollectorRegistry, Counter, Metric, PlatformCollector, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field, ValidationError

from app.settings import Settings
from service.files import atomic_write
from service.machine import share, usable_cores

if TYPE_CHECKING:  # they import torch, which the supervisor does not need
    from service.engine import Engine
    from service.options import EngineOptions
    from service.results import Health

log = structlog.get_logger(component="supervisor")

REPORT_SECONDS = 1.0
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 30.0
STEADY_SECONDS = 60.0  # a worker that ran for longer ended for a new reason
OVERTIME_SECONDS = 10.0  # beyond PVT_SHUTDOWN_SECONDS, for a worker that does not end
STARTUP_FAILURE = 3  # uvicorn's exit code
_ROOT = Path(__file__).parent.parent


class Report(BaseModel):
    """A worker's health, how many batches it runs at a time, and when it wrote so, on the machine's monotonic clock."""

    live: bool
    ready: bool
    reasons: list[str]
    instances: int = 0
    at: float = Field(default_factory=monotonic)

    def silent_seconds(self) -> float:
        """How long ago it was written, beyond the time in which the next one was due."""
        return monotonic() - self.at - 2 * REPORT_SECONDS


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """`size` workers, numbered from 0, and the folder they share."""

    folder: Path
    size: int

    def report_file(self, worker: int) -> Path:
        """Where `worker` writes its reports."""
        return self.folder / f"worker{worker}.json"

    def last_report(self, worker: int) -> Report | None:
        """The last report of `worker`; None when its process has written none since it started."""
        try:
            return Report.model_validate_json(self.report_file(worker).read_bytes())
        except (OSError, ValidationError):
            return None

    def forget(self, worker: int) -> None:
        """Call it when the process of `worker` has ended, before another replaces it."""
        self.report_file(worker).unlink(missing_ok=True)
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
        instances, memory = max(instances, len(options.devices)), options.memory_bytes // self.group.size
        return replace(options, instances=instances, cores=cores, budget=budget, memory_bytes=memory)

    def health(self, own: "Health", stall_seconds: float) -> "Health":
        """`own` and that of the other workers combined: a client reaches any of them, and means the service.

        A worker that is silent for `stall_seconds` is neither live nor ready.
        """
        live, ready, reasons = own.live, own.ready, [*own.reasons]
        for other in range(self.group.size):
            if other == self.index:
                continue
            report = self.group.last_report(other) or Report(live=True, ready=False, reasons=["starting"])
            if report.silent_seconds() > stall_seconds:
                reason = f"has not reported for {monotonic() - report.at:.0f} s"
                report = Report(live=False, ready=False, reasons=[reason])
            live, ready = live and report.live, ready and report.ready
            reasons.extend(f"worker {other}: {reason}" for reason in report.reasons)
        return replace(own, live=live, ready=ready, reasons=reasons)

    @asynccontextmanager
    async def reporting(self, engine: "Engine") -> AsyncIterator[None]:
        """Report each second, keep the gauges of `engine` up to date, stop when the supervisor closes the pipe."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.remove_reader(self.stop_pipe)
            os.kill(os.getpid(), signal.SIGTERM)

        async def keep_reporting() -> None:
            while True:
                await asyncio.sleep(REPORT_SECONDS)
                await self._report(engine)

        loop.add_reader(self.stop_pipe, stop)
        await self._report(engine)
        task = asyncio.create_task(keep_reporting())
        try:
            yield
        finally:
            task.cancel()
            loop.remove_reader(self.stop_pipe)

    async def _report(self, engine: "Engine") -> None:
        engine.collect_metrics()
        report = Report(**asdict(await engine.health()), instances=engine.options.instances)
        atomic_write(self.group.report_file(self.index), report.model_dump_json())


def supervise(settings: Settings, listener: socket.socket) -> int:
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
        if self._stopping.is_set():
            self._send(signal.SIGTERM)  # a worker that drains stops at once
        else:
            log.info("draining", signal=signal.Signals(sig).name)
            self._stop()

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
        size = self._group.size
        while not all(reports := [self._group.last_report(worker) for worker in range(size)]):  # noqa: ASYNC110
            await asyncio.sleep(REPORT_SECONDS / 20)
        self._all_up = True
        url = "http://{}:{}".format(*self._listener.getsockname())
        instances = sum(report.instances for report in reports if report)
        log.info("listening", url=url, workers=size, instances=instances, cores=usable_cores())

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
        """Start the process of `worker`, and another when it ends, until all are to stop."""
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
        listener = self._listener.fileno()
        arguments = map(str, (worker, self._group.size, self._group.folder, listener, self._stop_pipe))
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # -P: a module `app` in the current folder is another application.
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "app", "--as-worker", *arguments),
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=(listener, self._stop_pipe),
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
