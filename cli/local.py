"""An engine in this process with the methods of the client that commands use."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar, Unpack

import numpy as np
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from app.main import engine_options
from app.routes.explain import ExplainQuery
from app.routes.model_info import model_info
from cli.options import read_settings
from cli.terminal import USAGE, CommandError, logs_on_stderr
from pvt_client import ClassScore, Embedding, Explanation, ImageUnreadable, Model, Prediction, PvtError
from pvt_client.calls import CommonOptions, ExplainOptions, FeaturesOptions, MapOptions, PredictOptions
from pvt_client.concurrency import in_tasks
from pvt_client.results import read_model
from service import postprocess
from service.engine import Engine
from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.metrics import EngineMetrics
from service.results import ImageResult, InferenceResult

T = TypeVar("T")
_TIMEOUT_SECONDS = 3600.0  # nobody else is waiting; the first image waits until its model is loaded


@asynccontextmanager
async def local_engine() -> AsyncIterator["LocalEngine"]:
    """An engine with the settings of the environment; its errors are logged to standard error.

    Raises:
        CommandError: a setting is wrong.
    """
    settings = read_settings()
    with logs_on_stderr(logging.ERROR):
        async with Engine(engine_options(settings), EngineMetrics(CollectorRegistry())) as engine:
            yield LocalEngine(engine, settings.max_body_bytes)


class LocalEngine:
    """An engine; see `cli.target.Inference`. Files of more than `max_bytes` are refused unread."""

    def __init__(self, engine: Engine, max_bytes: int) -> None:
        self._engine = engine
        self._max_bytes = max_bytes

    def predict_many(
        self,
        images: Iterable[Path],
        *,
        concurrency: int = 0,  # noqa: ARG002
        **options: Unpack[PredictOptions],
    ) -> AsyncGenerator[tuple[Path, Prediction | PvtError | ServiceError]]:
        """See `AsyncClient`; `concurrency` is not used."""

        async def predict(path: Path) -> Prediction:
            answered, result = await self._infer(path, options)
            scores = postprocess.top_k(result.outputs.logits, answered.card.labels, options.get("top_k", 5))
            classes = tuple(ClassScore(each.class_id, each.label, each.score) for each in scores)
            return Prediction(path.name, result.width, result.height, classes, answered.model, answered.version)

        return self._many(predict, images)

    def embedding_many(
        self,
        images: Iterable[Path],
        *,
        concurrency: int = 0,  # noqa: ARG002
        **options: Unpack[FeaturesOptions],
    ) -> AsyncGenerator[tuple[Path, Embedding | PvtError | ServiceError]]:
        """See `AsyncClient`; `concurrency` is not used."""

        async def embed(path: Path) -> Embedding:
            answered, result = await self._infer(path, options)
            vector = result.outputs.embedding
            if options.get("normalize"):
                vector = vector / np.float32(np.linalg.norm(vector) or 1)
            return Embedding(result.width, result.height, vector, answered.model, answered.version)

        return self._many(embed, images)

    async def explain(self, image: Path, /, **options: Unpack[ExplainOptions]) -> bytes:
        """See `AsyncClient`."""
        _, explanation = await self._explain(image, options.get("class_id"), options)
        alpha = options.get("alpha")
        return await asyncio.to_thread(
            postprocess.overlay, explanation, ExplainQuery().alpha if alpha is None else alpha
        )

    async def explain_map(self, image: Path, /, **options: Unpack[MapOptions]) -> Explanation:
        """See `AsyncClient`."""
        answered, found = await self._explain(image, options.get("class_id"), options)
        numbers = {name: getattr(found, name) for name in ("class_id", "label", "score", "logit", "bias", "map")}
        width, height = found.inferred.width, found.inferred.height
        return Explanation(
            **numbers, filename=image.name, width=width, height=height, model=answered.model, version=answered.version
        )

    async def models(self) -> list[Model]:
        """See `AsyncClient`."""
        infos = [model_info(model) for model in await self._engine.models()]
        return [read_model(each.model_dump(mode="json", exclude_none=True)) for each in infos]

    def _many(
        self, work: Callable[[Path], Awaitable[T]], images: Iterable[Path]
    ) -> AsyncGenerator[tuple[Path, T | PvtError | ServiceError]]:
        async def result(path: Path) -> T | PvtError | ServiceError:
            try:
                return await work(path)
            except (ImageUnreadable, InvalidImage, ImageTooLarge) as error:
                return error

        # Enough to keep every thread busy: full batches, and images decoded meanwhile. The queue would refuse more.
        limits = self._engine.options
        busy = limits.instances * limits.max_batch_size + limits.cores
        return in_tasks(result, images, min(busy, limits.queue_size))

    async def _explain(
        self, path: Path, class_id: int | None, options: CommonOptions
    ) -> tuple[InferenceResult, postprocess.Explanation]:
        answered, _ = await self._infer(path, options, stages=True)
        (found,) = postprocess.explain(answered, class_id)
        if isinstance(found, ServiceError):
            raise found
        return answered, found

    async def _infer(
        self, path: Path, options: CommonOptions, *, stages: bool = False
    ) -> tuple[InferenceResult, ImageResult]:
        size = _input_size(options.get("size"))
        data = await asyncio.to_thread(self._read, path)
        answered = await self._engine.infer(
            [data], model=options.get("model"), size=size, stages=stages, timeout_seconds=_TIMEOUT_SECONDS
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


def _input_size(size: object) -> tuple[int, int] | None:
    try:
        return ExplainQuery(size=str(size)).input_size if size else None
    except ValidationError as error:
        raise CommandError(f"--size {size}: {error.errors()[0]['msg']}", USAGE) from error
