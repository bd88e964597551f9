"""Answers from a service, through its client."""

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from cli.asked import Asked, Bad
from pvt_client import AsyncClient, Explanation, Prediction, calls
from pvt_client.answers import Embedding


class Service:
    """The service that `client` asks; see `cli.answering.Answering`."""

    def __init__(self, client: AsyncClient, asked: Asked) -> None:
        self._client = client
        self._asked = asked

    def predict(self, paths: Iterable[Path], top_k: int) -> AsyncIterator[tuple[Path, Prediction | Bad]]:
        """See `Answering`."""
        model, size, concurrency = self._asked.model, self._asked.size, self._asked.concurrency
        return self._client.predict_many(paths, concurrency=concurrency, model=model, size=size, top_k=top_k)

    def embed(self, paths: Iterable[Path], *, normalize: bool) -> AsyncIterator[tuple[Path, Embedding | Bad]]:
        """See `Answering`."""
        model, size = self._asked.model, self._asked.size
        return self._client.many(
            lambda path: calls.embedding(path, model=model, size=size, normalize=normalize),
            paths,
            concurrency=self._asked.concurrency,
        )

    async def overlay(self, path: Path, class_id: int | None, alpha: float | None) -> bytes:
        """See `Answering`."""
        model, size = self._asked.model, self._asked.size
        return await self._client.explain(path, model=model, size=size, class_id=class_id, alpha=alpha)

    async def explain(self, path: Path, class_id: int | None) -> Explanation:
        """See `Answering`."""
        model, size = self._asked.model, self._asked.size
        return await self._client.explain_map(path, model=model, size=size, class_id=class_id)

    async def models(self) -> list[dict[str, Any]]:
        """See `Answering`."""
        return [dict(model.details) for model in await self._client.models()]
