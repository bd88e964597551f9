"""Canary images: while a model serves, its graphs must go on to reproduce its reference logits (decision 96)."""

import asyncio
from collections.abc import Iterator
from functools import partial
from weakref import ReferenceType, ref

import structlog

from service.errors import ServiceError
from service.metrics import EngineMetrics
from service.pipeline import Pipeline
from service.registry.registry import Registry, now
from service.registry.resident import Resident

log = structlog.get_logger(component="canary")

LOOK_AGAIN_SECONDS = 0.25
PATIENCE = 5  # periods, for which a busy service puts its canaries off
SHARE = 0.01  # of the time, at the most, that canaries take of one instance


class Canaries:
    """Runs one graph of each loaded model on a reference image every `seconds`, by turns, and reports what is wrong.

    It waits until no image is on its way through the engine. A model whose logits are off by more than its load allows
    is loaded again, or fails: see `Registry.distrust`.
    """

    def __init__(
        self, registry: Registry[Resident], pipeline: Pipeline, metrics: EngineMetrics, seconds: float
    ) -> None:
        self._registry = registry
        self._pipeline = pipeline
        self._metrics = metrics
        self._seconds = seconds
        self._round = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        spent = 0.0
        while True:
            await asyncio.sleep(max(self._seconds, spent / SHARE))
            spent, give_up = 0.0, now() + PATIENCE * self._seconds
            for loaded in self._loaded():
                while not self._pipeline.scheduler.idle and now() < give_up:  # noqa: ASYNC110  requests wake nobody
                    await asyncio.sleep(LOOK_AGAIN_SECONDS)
                start = now()
                try:
                    await self._check(loaded)
                except Exception:  # the next one may do better, and nothing else looks at the models
                    log.exception("canary_not_run")
                spent += now() - start
            self._round += 1

    def _loaded(self) -> Iterator[ReferenceType[Resident]]:
        """What is loaded now, without keeping any of it in memory."""
        return iter([ref(each) for each in self._registry.loaded()])

    async def _check(self, loaded: ReferenceType[Resident]) -> None:
        resident = loaded()
        if resident is None:
            return
        with self._registry.held(resident) as held:
            if not held:
                return
            stored = resident.executable.stored
            try:
                wrong = await self._pipeline.on_instance(partial(resident.wrong, self._round))
            except ServiceError as error:  # of memory, of a GPU, of the end of the service: others look after these
                self._metrics.canaries.labels(stored.id, "not_run").inc()
                log.warning("canary_not_run", model=stored.id, version=stored.version, reason=str(error))
                return
            except Exception as error:  # noqa: BLE001  what fails on an image that is in order is wrong too
                wrong = f"it failed with {type(error).__name__}: {error}"
            self._metrics.canaries.labels(stored.id, "wrong" if wrong else "right").inc()
            self._metrics.canary_failures.labels(stored.id).inc(1 if wrong else 0)
            if wrong:
                log.error("canary_wrong", model=stored.id, version=stored.version, reason=wrong)
                self._registry.distrust(resident, wrong)
