"""`python -m tests.service.machine.memory_rounds STORE BACKEND ROUNDS`: load and unload every model of a store in turn.

Prints the resident bytes after each unloading, a line each: round, model, bytes while loaded, bytes afterwards.
"""

import asyncio
import gc
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from service.engine import Engine
from service.execution import plan
from service.machine import give_back, resident_bytes
from service.metrics import EngineMetrics
from service.options import EngineOptions


def settled_bytes() -> int:
    """Resident memory once all free memory has gone back to the kernel."""
    give_back()
    return resident_bytes()


async def main(root: Path, models: Sequence[str], backend: str, rounds: int) -> None:
    name: Any = backend
    options = EngineOptions(
        model_store=root, default_model=models[0], backend=name, max_batch_size=1, instances=1, cores=1
    )
    gc.freeze()  # so that looking for garbage takes no longer than what was loaded since is worth
    async with Engine(options, EngineMetrics(CollectorRegistry())) as engine:
        for turn in range(rounds):
            for model in models:
                await engine.load(model)
                (loaded,) = engine._registry.loaded()
                size = loaded.memory_bytes
                del loaded
                await engine.unload(model)
                print(turn, model, size, settled_bytes(), flush=True)  # noqa: T201  it is what it is for


if __name__ == "__main__":
    plan._RUNS = plan._MIN_RUNS = 1  # how exact a plan is does not matter here
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
                        logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # fmt: skip
    store = Path(sys.argv[1])
    asyncio.run(main(store, sorted(path.name for path in store.iterdir()), sys.argv[2], int(sys.argv[3])))
