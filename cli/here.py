"""Answers from an engine in this process."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from app.main import engine_options
from app.routes.inference import InferenceQuery
from app.routes.model_info import model_info
from app.settings import Settings, SettingsInvalid
from cli.asked import Asked, Bad
from cli.terminal import USAGE, CommandError
from pvt_client import Explanation, ImageUnreadable, Prediction
from pvt_client.answers import ClassScore, Embedding
from pvt_client.windows import in_tasks
from service.answers.explain import Explanation as Explained
from service.answers.explain import explain, overlay
from service.answers.outputs import top_k as best_classes
from service.answers.results import Answered, Inferred
from service.engine import Engine
from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.metrics import EngineMetrics

T = TypeVar("T")
_ALPHA = 0.5  # as ExplainQuery
_PATIENCE_SECONDS = 3600.0  # nobody waits at the other end; the first picture waits for its model


@asynccontextmanager
async def engine_here(asked: Asked) -> AsyncIterator["Here"]:
    """An engine with the settings of the environment; warnings of its go to standard error.

    Raises:
        CommandError: a setting is wrong.
    """
    try:
        settings = Settings.from_environment()
    except SettingsInvalid as error:
        raise CommandError(str(error), USAGE) from error
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        async with Engine(engine_options(settings), EngineMetrics(CollectorRegistry())) as engine:
            yield Here(engine, asked, settings.max_body_bytes)
    finally:
        structlog.configure(**before)


class Here:
    """The engine; see `cli.answering.Answering`. Files of more than `max_bytes` are refused unread."""

    def __init__(self, engine: Engine, asked: Asked, max_bytes: int) -> None:
        self._engine = engine
        self._asked = asked
        self._max_bytes = max_bytes
        try:
            self._size = InferenceQuery(size=asked.size).input_size if asked.size else None
        except ValidationError as error:
            raise CommandError(f"--size {asked.size}: {error.errors()[0]['msg']}", USAGE) from error
        # As many as keep every thread busy: full batches, and pictures decoded meanwhile; more would be refused.
        busy = engine.options.instances * engine.options.max_batch_size + engine.options.cores
        self._ahead = min(busy, engine.options.queue_size)

    def predict(self, paths: Iterable[Path], top_k: int) -> AsyncIterator[tuple[Path, Prediction | Bad]]:
        """See `Answering`."""

        async def one(path: Path) -> Prediction:
            answered, seen = await self._infer(path)
            scores = best_classes(seen.outputs.logits, answered.card.labels, top_k)
            classes = tuple(ClassScore(each.class_id, each.label, each.score) for each in scores)
            return Prediction(path.name, seen.width, seen.height, classes, answered.card.id, answered.version)

        return in_tasks(_in_place(one), paths, self._ahead)

    def embed(self, paths: Iterable[Path], *, normalize: bool) -> AsyncIterator[tuple[Path, Embedding | Bad]]:
        """See `Answering`."""

        async def one(path: Path) -> Embedding:
            answered, seen = await self._infer(path)
            vector = seen.outputs.embedding
            if normalize:
                vector = vector / np.float32(np.linalg.norm(vector) or 1)
            return Embedding(seen.width, seen.height, vector, answered.card.id, answered.version)

        return in_tasks(_in_place(one), paths, self._ahead)

    async def overlay(self, path: Path, class_id: int | None, alpha: float | None) -> bytes:
        """See `Answering`."""
        explained = await self._explain(path, class_id)
        return await asyncio.to_thread(overlay, explained[1], _ALPHA if alpha is None else alpha)

    async def explain(self, path: Path, class_id: int | None) -> Explanation:
        """See `Answering`."""
        answered, found = await self._explain(path, class_id)
        return Explanation(
            filename=path.name,
            width=found.inferred.width,
            height=found.inferred.height,
            class_id=found.class_id,
            label=found.label,
            score=found.score,
            logit=found.logit,
            bias=found.bias,
            map=found.map,
            model=answered.model,
            version=answered.version,
        )

    async def models(self) -> list[dict[str, Any]]:
        """See `Answering`."""
        found = [model_info(model) for model in await self._engine.models.all()]
        return [each.model_dump(mode="json", exclude_none=True) for each in found]

    async def _explain(self, path: Path, class_id: int | None) -> tuple[Answered, Explained]:
        answered, _ = await self._infer(path, stages=True)
        (found,) = explain(answered, class_id)
        if isinstance(found, ServiceError):
            raise found
        return answered, found

    async def _infer(self, path: Path, *, stages: bool = False) -> tuple[Answered, Inferred]:
        data = await asyncio.to_thread(self._read, path)
        answered = await self._engine.infer(
            [data], model=self._asked.model, size=self._size, stages=stages, timeout_seconds=_PATIENCE_SECONDS
        )
        (result,) = answered.results
        if isinstance(result, ServiceError):
            raise result
        return answered, result

    def _read(self, path: Path) -> bytes:
        try:
            if not path.is_file():
                raise ImageUnreadable(f"{path}: no file to read")
            if path.stat().st_size > self._max_bytes:
                raise ImageTooLarge(
                    f"the file is larger than {self._max_bytes / 1e6:g} MB, which PVT_MAX_BODY_MB allows"
                )
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise ImageUnreadable(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _in_place(work: Callable[[Path], Awaitable[T]]) -> Callable[[Path], Awaitable[T | Bad]]:
    """What one picture fails with takes its result's place; what all would fail with is raised."""

    async def run(path: Path) -> T | Bad:
        try:
            return await work(path)
        except (ImageUnreadable, InvalidImage, ImageTooLarge) as error:
            return error

    return run
