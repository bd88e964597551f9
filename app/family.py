"""Process metrics of a supervisor and its workers together, under the names that a single process gives its own."""

from collections.abc import Iterable

import psutil
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector


class FamilyCollector(Collector):
    """Sums over the process `parent` and its children."""

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
        """Processor seconds, bytes and descriptors; those of children that ended before count as their parent's."""
        while True:
            children = self._parent.children()
            try:
                seen = [_cpu_seconds(child) for child in children]
                times = self._parent.cpu_times()
                memory = [each.memory_info().rss for each in (self._parent, *children)]
                files = [each.num_fds() for each in (self._parent, *children)]
            except psutil.NoSuchProcess:
                if not self._parent.is_running():
                    raise
                continue
            if self._parent.children() == children:  # else one may have been counted twice or not at all
                own = times.user + times.system + times.children_user + times.children_system
                return own + sum(seen), sum(memory), sum(files)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
