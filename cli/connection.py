"""The connection to a target: an engine in this process, or a service through its client; commands need not care."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from typing_extensions import override

from cli.target import Failure, Inference, Target
from pvt_client import AsyncClient, Embedding, Explanation, Prediction, calls

_TIMEOUT_SECONDS = 600.0


@asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Inference]:
    """The engine or the service of `target`, for as long as the context lasts."""
    if target.url is None:
        from cli.local import local_engine  # noqa: PLC0415  imports torch, which --url and --help do not need

        async with local_engine(target) as engine:
            yield engine
    else:
        async with AsyncClient(target.url, api_key=target.api_key, timeout=_TIMEOUT_SECONDS) as client:
            yield RemoteService(client, target)


class RemoteService(Inference):
    """The service that `client` calls."""

    def __init__(self, client: AsyncClient, target: Target) -> None:
        self._client = client
        self._model, self._size, self._concurrency = target.model, target.size, target.concurrency

    @override
    def predict(self, paths: Iterable[Path], top_k: int) -> AsyncIterator[tuple[Path, Prediction | Failure]]:
        return self._client.predict_many(
            paths, concurrency=self._concurrency, model=self._model, size=self._size, top_k=top_k
        )

    @override
    def embed(self, paths: Iterable[Path], *, normalize: bool) -> AsyncIterator[tuple[Path, Embedding | Failure]]:
        return self._client.many(
            lambda path: calls.embedding(path, model=self._model, size=self._size, normalize=normalize),
            paths,
            concurrency=self._concurrency,
        )

    @override
    async def overlay(self, path: Path, class_id: int | None, alpha: float | None) -> bytes:
        return await self._client.explain(path, model=self._model, size=self._size, class_id=class_id, alpha=alpha)

    @override
    async def explain(self, path: Path, class_id: int | None) -> Explanation:
        return await self._client.explain_map(path, model=self._model, size=self._size, class_id=class_id)

    @override
    async def models(self) -> list[dict[str, Any]]:
        return [dict(model.details) for model in await self._client.models()]
