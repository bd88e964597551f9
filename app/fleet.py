"""What several worker processes know of each other: a private folder with their reports and their metrics.

A worker is known by its number, not by its process: the one that takes a dead one's place goes on with its counters, so
that no sum ever goes backwards.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from pydantic import BaseModel, ValidationError

REPORT_SECONDS = 1.0


class Report(BaseModel):
    """How a worker does, by its own account; `at` is when it said so, on the machine's monotonic clock.

    `instances` is how many batches it runs at a time.
    """

    live: bool
    ready: bool
    reasons: list[str]
    at: float
    instances: int = 0


@dataclass(frozen=True, slots=True)
class Fleet:
    """`size` workers, numbered from 0, and the folder they share."""

    folder: Path
    size: int

    def report(self, worker: int, *, live: bool, ready: bool, reasons: list[str], instances: int = 0) -> None:
        """Tell the others how `worker` does; call it every REPORT_SECONDS."""
        report = Report(live=live, ready=ready, reasons=reasons, at=monotonic(), instances=instances)
        draft = self._file(worker).with_suffix(".draft")
        draft.write_text(report.model_dump_json())
        draft.replace(self._file(worker))

    def last_report(self, worker: int) -> Report | None:
        """What `worker` said last; None when it has not said anything since it started."""
        try:
            return Report.model_validate_json(self._file(worker).read_bytes())
        except (OSError, ValidationError):
            return None

    def others(self, worker: int, silent_seconds: float) -> Iterator[tuple[int, Report]]:
        """What the workers beside `worker` say; one that was silent for `silent_seconds` is neither live nor ready."""
        for other in range(self.size):
            if other == worker:
                continue
            report = self.last_report(other)
            if report is None:
                report = Report(live=True, ready=False, reasons=["starting"], at=monotonic())
            elif (silent := monotonic() - report.at) > silent_seconds + 2 * REPORT_SECONDS:
                reason = f"has not said anything for {silent:.0f} s"
                report = Report(live=False, ready=False, reasons=[reason], at=report.at)
            yield other, report

    def forget(self, worker: int) -> None:
        """Call it when the process of `worker` has ended, before another takes its place."""
        self._file(worker).unlink(missing_ok=True)
        mark_process_dead(worker, str(self.folder))  # type: ignore[no-untyped-call]  # drops its gauges; its counters stay

    def share_metrics(self, identifier: str) -> None:
        """Keep the values of every metric that this process makes from now on where the whole fleet can read them."""
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.folder)
        values.ValueClass = values.MultiProcessValue(lambda: identifier)  # type: ignore[no-untyped-call]

    def collect_into(self, registry: CollectorRegistry) -> None:
        """Let `registry` give the sums over all workers."""
        MultiProcessCollector(registry, str(self.folder))  # type: ignore[no-untyped-call]

    def _file(self, worker: int) -> Path:
        return self.folder / f"worker{worker}.json"
