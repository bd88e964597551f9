"""One of several worker processes: its share of the machine, its reports, and its view of the whole service."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from app.workers.group import REPORT_SECONDS, WorkerGroup
from service.engine import Engine
from service.machine import share
from service.options import EngineOptions
from service.results import Health


@dataclass(frozen=True, slots=True)
class Worker:
    """Worker number `index` of `group`; the end of the pipe `stop_pipe` is its signal to stop."""

    group: WorkerGroup
    index: int
    stop_pipe: int

    def share_of(self, options: EngineOptions) -> EngineOptions:
        """`options` with this worker's share of instances, cores and memory."""
        instances, cores = (share(total, self.index, self.group.size) for total in (options.instances, options.cores))
        bound = options.budget.bytes
        budget = replace(options.budget, bytes=None if bound is None else bound // self.group.size)
        # A process that runs fewer batches at a time than there are GPUs would leave some of them unused.
        return replace(options, instances=max(instances, len(options.devices)), cores=cores, budget=budget)

    def health(self, own: Health, stall_seconds: float) -> Health:
        """`own` and that of the other workers combined: a client reaches any of them, and means the service."""
        live, ready, reasons = own.live, own.ready, list(own.reasons)
        for other, report in self.group.others(self.index, stall_seconds):
            live, ready = live and report.live, ready and report.ready
            reasons.extend(f"worker {other}: {reason}" for reason in report.reasons)
        return Health(live=live, ready=ready, reasons=reasons)

    @asynccontextmanager
    async def reporting(self, engine: Engine) -> AsyncIterator[None]:
        """Report, keep the gauges of `engine` up to date, and stop when the supervisor closes the pipe."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.stop_pipe, self._stop)
        await self._report(engine)
        task = asyncio.create_task(self._keep_reporting(engine))
        try:
            yield
        finally:
            task.cancel()
            loop.remove_reader(self.stop_pipe)

    async def _keep_reporting(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self._report(engine)

    async def _report(self, engine: Engine) -> None:
        engine.collect_metrics()
        health, instances = await engine.health(), engine.options.instances
        self.group.report(self.index, live=health.live, ready=health.ready, reasons=health.reasons, instances=instances)

    def _stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self.stop_pipe)
        os.kill(os.getpid(), signal.SIGTERM)
