"""An engine in this process with the methods of the client that commands use."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, Unpack

import numpy as np
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from app.main import engine_options
from app.routes.explain import ExplainQuery
from app.routes.model_info import model_info
from app.settings import Settings
from cli.terminal import USAGE, CommandError, logs_on_stderr
from pvt_client import ClassScore, Embedding, Explanation, ImageUnreadable, Model, Prediction, PvtError
from pvt_client.calls import CommonOptions, ExplainOptions, FeaturesOptions, MapOptions, PredictOptions, read_model
from pvt_client.client import in_tasks
from service.engine import Engine
from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.metrics import EngineMetrics
from service.postprocess import activation_maps
from service.postprocess.classes import top_k
from service.results import ImageResult, InferenceResult

T = TypeVar("T")
Results = AsyncGenerator[tuple[Path, T | PvtError | ServiceError]]
_TIMEOUT_SECONDS = 3600.0  # nobody else is waiting; the first image waits until its model is loaded


@asynccontextmanager
async def local_engine(settings: Settings) -> AsyncIterator["LocalEngine"]:
    """An engine with those `settings`; its errors are logged to standard error."""
    with logs_on_stderr(logging.ERROR):
        async with Engine(engine_options(settings), EngineMetrics(CollectorRegistry())) as engine:
            yield LocalEngine(engine, settings.max_body_bytes)


class LocalEngine:
    """Methods of `AsyncClient` on an engine; `concurrency` is not used. Larger files than `max_bytes` are refused."""

    def __init__(self, engine: Engine, max_bytes: int) -> None:
        self._engine = engine
        self._max_bytes = max_bytes

    def predict_many(
        self, images: Iterable[Path], *, concurrency: int = 0, **options: Unpack[PredictOptions]
    ) -> Results[Prediction]:
        """Each of `images` with its best classes."""

        async def predict(path: Path) -> Prediction:
            answered, result = await self._infer(path, options)
            scores = top_k(result.outputs.logits, answered.card.labels, options.get("top_k", 5))
            classes = tuple(ClassScore(each.class_id, each.label, each.score) for each in scores)
            return Prediction(path.name, result.width, result.height, classes, answered.model, answered.version)

        return self._many(predict, images)

    def embedding_many(
        self, images: Iterable[Path], *, concurrency: int = 0, **options: Unpack[FeaturesOptions]
    ) -> Results[Embedding]:
        """Each of `images` with its embedding."""

        async def embed(path: Path) -> Embedding:
            answered, result = await self._infer(path, options)
            vector = result.outputs.embedding
            if options.get("normalize"):
                vector = vector / np.float32(np.linalg.norm(vector) or 1)
            return Embedding(result.width, result.height, vector, answered.model, answered.version)

        return self._many(embed, images)

    async def explain(self, image: Path, /, **options: Unpack[ExplainOptions]) -> bytes:
        """The class activation map over the image, as a PNG."""
        _, found = await self._explain(image, options)
        alpha = options.get("alpha")
        return await asyncio.to_thread(activation_maps.overlay, found, ExplainQuery().alpha if alpha is None else alpha)

    async def explain_map(self, image: Path, /, **options: Unpack[MapOptions]) -> Explanation:
        """The class activation map in numbers."""
        answered, found = await self._explain(image, options)
        names = ("class_id", "label", "score", "logit", "bias", "map")
        fields: dict[str, Any] = {name: getattr(found, name) for name in names}
        fields |= {"filename": image.name, "width": found.inferred.width, "height": found.inferred.height}
        return Explanation(**fields, model=answered.model, version=answered.version)

    async def models(self) -> list[Model]:
        """Every model, as `GET /models` describes it."""
        infos = [model_info(model) for model in await self._engine.models()]
        return [read_model(each.model_dump(mode="json", exclude_none=True)) for each in infos]

    def _many(self, work: Callable[[Path], Awaitable[T]], images: Iterable[Path]) -> Results[T]:
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
        self, path: Path, options: MapOptions | ExplainOptions
    ) -> tuple[InferenceResult, activation_maps.Explanation]:
        answered, _ = await self._infer(path, options, stages=True)
        (found,) = activation_maps.explain(answered, options.get("class_id"))
        if isinstance(found, ServiceError):
            raise found
        return answered, found

    async def _infer(
        self, path: Path, options: CommonOptions, *, stages: bool = False
    ) -> tuple[InferenceResult, ImageResult]:
        size = options.get("size")
        try:
            input_size = ExplainQuery(size=str(size)).input_size if size else None
        except ValidationError as error:
            raise CommandError(f"--size {size}: {error.errors()[0]['msg']}", USAGE) from error
        data = await asyncio.to_thread(self._read, path)
        answered = await self._engine.infer(
            [data], model=options.get("model"), size=input_size, stages=stages, timeout_seconds=_TIMEOUT_SECONDS
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
                megabytes = f"{self._max_bytes / 1e6:g}"
                raise ImageTooLarge(f"the file is larger than {megabytes} MB, which PVT_MAX_BODY_MB allows")
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise ImageUnreadable(f"{path}: {getattr(error, 'strerror', None) or error}") from error
