"""An engine in this process behind the methods of the client."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, Unpack

import numpy as np
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from app.main import engine_options
from app.routes.images import ExplainQuery
from app.routes.models import model_info
from app.settings import Settings
from cli.terminal import USAGE, CommandError, logs_on_stderr
from pvt_client import ImageUnreadable, PvtError
from pvt_client.async_client import AsyncCalls
from pvt_client.batching import Make, ManyOptions
from pvt_client.calls import Call
from pvt_client.images import AnyImage
from service.engine import Engine
from service.errors import ImageTooLarge, InvalidImage, ServiceError
from service.metrics import EngineMetrics
from service.postprocess import check_classes, classify, explain, overlay
from service.results import ImageResult, InferenceResult
from service.store.cards import ModelCard

T = TypeVar("T")
_TIMEOUT_SECONDS = 3600.0  # nobody else is waiting; the first image waits until its model is loaded


@asynccontextmanager
async def running_engine(settings: Settings) -> AsyncIterator[Engine]:
    """An engine with those `settings`; its errors are logged to standard error."""
    with logs_on_stderr(logging.ERROR):
        async with Engine(engine_options(settings), EngineMetrics(CollectorRegistry())) as engine:
            yield engine


@asynccontextmanager
async def local_engine(settings: Settings) -> AsyncIterator["LocalEngine"]:
    """The methods of the client on an engine with those `settings`."""
    async with running_engine(settings) as engine:
        yield LocalEngine(engine, settings.max_body_bytes)


class LocalEngine(AsyncCalls):
    """Carries out the calls that commands make, on an engine; files of more than `max_bytes` are refused unread."""

    def __init__(self, engine: Engine, max_bytes: int) -> None:
        self._engine = engine
        self._max_bytes = max_bytes

    async def send(self, call: Call[T]) -> T:
        """The result of `call`, read from what the service would respond."""
        if call.path == "/models":
            infos = [model_info(model) for model in await self._engine.models()]
            return call.read({"models": [each.model_dump(mode="json", exclude_none=True) for each in infos]})
        (image,) = call.uploads or ()
        options: dict[str, Any] = dict(call.options)
        try:
            answered, result = await self._infer(image.data, options, call.path)
        except (InvalidImage, ImageTooLarge) as error:
            raise ImageUnreadable(str(error)) from error
        fields: dict[str, Any] = {"filename": image.filename, "width": result.width, "height": result.height}
        if call.path == "/predict":
            answer = classify(result.outputs.logits, answered.card, options.get("top_k"), options.get("min_score"))
            fields |= {**answer, "predictions": [asdict(each) for each in answer["predictions"]]}
        elif call.path == "/features":
            vector = result.outputs.embedding
            norm = np.linalg.norm(vector) if options.get("normalize") else 1
            fields["embedding"] = vector / np.float32(norm or 1)
        else:
            (found,) = explain(answered, options.get("class_id"))
            if isinstance(found, ServiceError):
                raise found
            if call.accept == "image/png":
                alpha = options.get("alpha")
                return call.read(
                    await asyncio.to_thread(overlay, found, ExplainQuery().alpha if alpha is None else alpha)
                )
            fields |= {name: getattr(found, name) for name in ("class_id", "label", "score", "logit", "bias", "map")}
        whole = {"model": answered.model, "version": answered.version, "activation": answered.card.activation}
        return call.read({**whole, "results": [fields]})

    async def prepare(self, make: Callable[[], T], images: Sequence[object]) -> T:
        """See `AsyncCalls.prepare`; a file is checked before it is read."""

        def checked() -> T:
            for image in images:
                if isinstance(image, Path):
                    self._check(image)
            return make()

        return await super().prepare(checked, images)

    def many(
        self,
        make: Make[T],
        images: Iterable[AnyImage] | AsyncIterable[AnyImage],
        concurrency: int,
        **options: Unpack[ManyOptions],
    ) -> AsyncGenerator[tuple[AnyImage, T | PvtError]]:
        """See `AsyncCalls.many`; `concurrency` is what keeps every thread busy."""
        return super().many(make, images, self._engine.options.images_at_a_time, **options)

    async def _infer(self, data: bytes, options: dict[str, Any], path: str) -> tuple[InferenceResult, ImageResult]:
        size = options.get("size")
        try:
            input_size = ExplainQuery(size=str(size)).input_size if size else None
        except ValidationError as error:
            raise CommandError(f"--size {size}: {error.errors()[0]['msg']}", USAGE) from error

        def check(card: ModelCard) -> None:
            if path != "/features":
                check_classes(card, options.get("class_id"), options.get("min_score"))

        answered = await self._engine.infer(
            [data],
            model=options.get("model"),
            size=input_size,
            default_size=ExplainQuery().default_size if path == "/explain" else None,
            stages=path == "/explain",
            check=check,
            timeout_seconds=_TIMEOUT_SECONDS,
        )
        (result,) = answered.results
        if isinstance(result, ServiceError):
            raise result
        return answered, result

    def _check(self, path: Path) -> None:
        try:
            if not path.is_file():
                raise ImageUnreadable(f"{path}: no file to read")
            if path.stat().st_size > self._max_bytes:
                megabytes = f"{self._max_bytes / 1e6:g}"
                raise ImageUnreadable(f"the file is larger than {megabytes} MB, which PVT_MAX_BODY_MB allows")
        except (OSError, ValueError) as error:
            raise ImageUnreadable(f"{path}: {getattr(error, 'strerror', None) or error}") from error
