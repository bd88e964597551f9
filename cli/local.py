"""Inference by an engine in this process."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from typing_extensions import override

from app.engine_options import engine_options
from app.model_info import model_info
from app.queries import ExplainQuery
from cli.options import read_settings
from cli.target import Failure, Inference, Target
from cli.terminal import USAGE, CommandError, logs_on_stderr
from pvt_client import ClassScore, Embedding, Explanation, ImageUnreadable, Prediction
from pvt_client.concurrency import in_tasks
from service.answers import explain as activation
from service.answers.outputs import top_k as best_classes
from service.answers.results import Answered, Inferred
from service.engine import Engine
from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.metrics import EngineMetrics

T = TypeVar("T")
_TIMEOUT_SECONDS = 3600.0  # nobody else is waiting; the first image waits until its model is loaded


@asynccontextmanager
async def local_engine(target: Target) -> AsyncIterator["LocalEngine"]:
    """An engine with the settings of the environment; its errors are logged to standard error.

    Raises:
        CommandError: a setting is wrong.
    """
    settings = read_settings()
    with logs_on_stderr(logging.ERROR):
        async with Engine(engine_options(settings), EngineMetrics(CollectorRegistry())) as engine:
            yield LocalEngine(engine, target, settings.max_body_bytes)


class LocalEngine(Inference):
    """An engine. Files of more than `max_bytes` are refused unread."""

    def __init__(self, engine: Engine, target: Target, max_bytes: int) -> None:
        self._engine = engine
        self._model = target.model
        self._max_bytes = max_bytes
        try:
            self._query = ExplainQuery(size=target.size) if target.size else ExplainQuery()
        except ValidationError as error:
            raise CommandError(f"--size {target.size}: {error.errors()[0]['msg']}", USAGE) from error
        # Enough to keep every thread busy: full batches, and images decoded meanwhile. The queue would refuse more.
        busy = engine.options.instances * engine.options.max_batch_size + engine.options.cores
        self._concurrency = min(busy, engine.options.queue_size)

    @override
    def predict(self, paths: Iterable[Path], top_k: int) -> AsyncIterator[tuple[Path, Prediction | Failure]]:
        async def one(path: Path) -> Prediction:
            answered, result = await self._infer(path)
            scores = best_classes(result.outputs.logits, answered.card.labels, top_k)
            classes = tuple(ClassScore(each.class_id, each.label, each.score) for each in scores)
            return Prediction(path.name, result.width, result.height, classes, answered.model, answered.version)

        return in_tasks(_or_failure(one), paths, self._concurrency)

    @override
    def embed(self, paths: Iterable[Path], *, normalize: bool) -> AsyncIterator[tuple[Path, Embedding | Failure]]:
        async def one(path: Path) -> Embedding:
            answered, result = await self._infer(path)
            vector = result.outputs.embedding
            if normalize:
                vector = vector / np.float32(np.linalg.norm(vector) or 1)
            return Embedding(result.width, result.height, vector, answered.model, answered.version)

        return in_tasks(_or_failure(one), paths, self._concurrency)

    @override
    async def overlay(self, path: Path, class_id: int | None, alpha: float | None) -> bytes:
        _, explanation = await self._explain(path, class_id)
        return await asyncio.to_thread(activation.overlay, explanation, self._query.alpha if alpha is None else alpha)

    @override
    async def explain(self, path: Path, class_id: int | None) -> Explanation:
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

    @override
    async def models(self) -> list[dict[str, Any]]:
        infos = [model_info(model) for model in await self._engine.models.all()]
        return [each.model_dump(mode="json", exclude_none=True) for each in infos]

    async def _explain(self, path: Path, class_id: int | None) -> tuple[Answered, activation.Explanation]:
        answered, _ = await self._infer(path, stages=True)
        (found,) = activation.explain(answered, class_id)
        if isinstance(found, ServiceError):
            raise found
        return answered, found

    async def _infer(self, path: Path, *, stages: bool = False) -> tuple[Answered, Inferred]:
        data = await asyncio.to_thread(self._read, path)
        answered = await self._engine.infer(
            [data], model=self._model, size=self._query.input_size, stages=stages, timeout_seconds=_TIMEOUT_SECONDS
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


def _or_failure(work: Callable[[Path], Awaitable[T]]) -> Callable[[Path], Awaitable[T | Failure]]:
    """`work`, but the error of one image is returned in place of its result; one that all would meet is raised."""

    async def result(path: Path) -> T | Failure:
        try:
            return await work(path)
        except (ImageUnreadable, InvalidImage, ImageTooLarge) as error:
            return error

    return result
