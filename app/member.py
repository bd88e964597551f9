"""A worker process as one of several: its share of the machine, its reports, and what it says for all of them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, PlatformCollector

from app.family import FamilyCollector
from app.fleet import REPORT_SECONDS, Fleet
from service.engine import Engine
from service.machine.cores import share
from service.options import EngineOptions
from service.results import Health


@dataclass(frozen=True, slots=True)
class Member:
    """Worker number `index` of `fleet`; `watched` is a pipe whose end tells it to stop."""

    fleet: Fleet
    index: int
    watched: int

    def share_of(self, options: EngineOptions) -> EngineOptions:
        """`options` with this worker's share of instances, cores and memory."""
        parts = [share(total, self.index, self.fleet.size) for total in (options.instances, options.cores)]
        bound = options.budget.bytes
        budget = replace(options.budget, bytes=None if bound is None else bound // self.fleet.size)
        # A process that has fewer batches at a time than GPUs would leave some of them to nobody.
        return replace(options, instances=max(parts[0], len(options.devices)), cores=parts[1], budget=budget)

    def registry(self) -> CollectorRegistry:
        """What gives the metrics of all workers."""
        registry = CollectorRegistry()
        self.fleet.collect_into(registry)
        registry.register(FamilyCollector(os.getppid()))
        PlatformCollector(registry=registry)
        return registry

    def health(self, own: Health, stall_seconds: float) -> Health:
        """`own` and that of the others together: whoever asks reaches any of them, and means the service."""
        live, ready, reasons = own.live, own.ready, list(own.reasons)
        for other, report in self.fleet.others(self.index, stall_seconds):
            live, ready = live and report.live, ready and report.ready
            reasons.extend(f"worker {other}: {reason}" for reason in report.reasons)
        return Health(live=live, ready=ready, reasons=reasons)

    @asynccontextmanager
    async def at_work(self, engine: Engine) -> AsyncIterator[None]:
        """Report, keep the gauges of `engine` up to date, and stop when told."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.watched, self._told_to_stop)
        await self._report(engine)
        reporting = asyncio.create_task(self._keep_reporting(engine))
        try:
            yield
        finally:
            reporting.cancel()
            loop.remove_reader(self.watched)

    async def _keep_reporting(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self._report(engine)

    async def _report(self, engine: Engine) -> None:
        engine.collect_metrics()
        health = await engine.health()
        self.fleet.report(
            self.index,
            live=health.live,
            ready=health.ready,
            reasons=health.reasons,
            instances=engine.options.instances,
        )

    def _told_to_stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self.watched)
        os.kill(os.getpid(), signal.SIGTERM)
