"""One of several worker processes on one socket, and what all share; `app/supervisor.py` keeps them running.

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
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

import psutil
import structlog
from prometheus_client import CollectorRegistry, Metric, PlatformCollector, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field, ValidationError

from service.awake import AwakeClock
from service.files import atomic_write, locked
from service.machine import share

if TYPE_CHECKING:  # they import torch, which the supervisor does not need
    from app.stats import Share
    from service.engine import Engine
    from service.options import EngineOptions
    from service.results import Health

REPORT_SECONDS = 1.0
OVERTIME_SECONDS = 3.0  # beyond PVT_SHUTDOWN_SECONDS, for a worker that does not end
LOCK = "lock"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


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

    def silent_seconds(self, clock: AwakeClock) -> float:
        """How long ago it was written, by `clock`, beyond the time in which the next one was due."""
        return clock.since(self.at) - 2 * REPORT_SECONDS


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

    def health(self, own: "Health", stall_seconds: float, clock: AwakeClock) -> "Health":
        """`own` and that of the other workers combined: a client reaches any of them, and means the service.

        A worker that is silent for `stall_seconds` of `clock` is neither live nor ready. One that starts makes the
        others unready only until all have been ready once.
        """
        reports = [self.group.last_report(each) or _STARTING for each in range(self.group.size)]
        reports[self.index] = Report(**asdict(own), starting=reports[self.index].starting and not own.ready)
        for worker, report in enumerate(reports):
            if report.silent_seconds(clock) > stall_seconds:
                reason = f"has not reported for {clock.since(report.at):.0f} s"
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
