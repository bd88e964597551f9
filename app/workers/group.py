"""What several worker processes share: a private folder with their reports and their metrics.

A worker is known by its number, not by its process: the one that replaces a dead one goes on with its counters, so that
no sum ever goes backwards.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import psutil
from prometheus_client import CollectorRegistry, Metric, PlatformCollector, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from pydantic import BaseModel, ValidationError

from service.files import atomic_write

REPORT_SECONDS = 1.0


class Report(BaseModel):
    """A worker's own report of its health; `at` is its time on the machine's monotonic clock.

    `instances` is how many batches it runs at a time.
    """

    live: bool
    ready: bool
    reasons: list[str]
    at: float
    instances: int = 0

    def silent_seconds(self) -> float:
        """How long ago it was written, beyond the time in which the next one was due."""
        return monotonic() - self.at - 2 * REPORT_SECONDS


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """`size` workers, numbered from 0, and the folder they share."""

    folder: Path
    size: int

    def report(self, worker: int, *, live: bool, ready: bool, reasons: list[str], instances: int = 0) -> None:
        """Publish the health of `worker`; call it every REPORT_SECONDS."""
        report = Report(live=live, ready=ready, reasons=reasons, at=monotonic(), instances=instances)
        atomic_write(self._file(worker), report.model_dump_json())

    def last_report(self, worker: int) -> Report | None:
        """The last report of `worker`; None when its process has written none since it started."""
        try:
            return Report.model_validate_json(self._file(worker).read_bytes())
        except (OSError, ValidationError):
            return None

    def others(self, worker: int, stall_seconds: float) -> Iterator[tuple[int, Report]]:
        """The reports of the other workers; one that is silent for `stall_seconds` is neither live nor ready."""
        for other in range(self.size):
            if other == worker:
                continue
            report = self.last_report(other)
            if report is None:
                report = Report(live=True, ready=False, reasons=["starting"], at=monotonic())
            elif report.silent_seconds() > stall_seconds:
                reason = f"has not reported for {monotonic() - report.at:.0f} s"
                report = Report(live=False, ready=False, reasons=[reason], at=report.at)
            yield other, report

    def forget(self, worker: int) -> None:
        """Call it when the process of `worker` has ended, before another replaces it."""
        self._file(worker).unlink(missing_ok=True)
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

    def _file(self, worker: int) -> Path:
        return self.folder / f"worker{worker}.json"


class _ProcessesCollector(Collector):
    """Process metrics, under the names that a single process gives its own, as sums over `parent` and its children."""

    def __init__(self, parent: int) -> None:
        self._parent = psutil.Process(parent)

    def collect(self) -> Iterable[Metric]:
        """See `Collector.collect`; nothing while the parent is gone."""
        try:
            cpu, resident, files = self._sums()
            started = self._parent.create_time()
        except psutil.NoSuchProcess:
            return
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
                memory = [each.memory_info().rss for each in (self._parent, *children)]
                files = [each.num_fds() for each in (self._parent, *children)]
            except psutil.NoSuchProcess:
                if not self._parent.is_running():
                    raise
                continue
            if self._parent.children() == children:  # else one may have been counted twice or not at all
                return cpu, sum(memory), sum(files)
