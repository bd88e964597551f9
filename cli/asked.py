"""What commands ask for, whoever answers it."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pvt_client import Explanation, Prediction, PvtError
from pvt_client.answers import Embedding
from service.errors import ServiceError

Bad = PvtError | ServiceError | OSError
"""Why there is no result for one picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Whom to ask, and for what. `url` None: this process."""

    url: str | None = None
    api_key: str | None = None
    model: str | None = None
    size: str | None = None
    concurrency: int = 8


class Answering(Protocol):
    """Answers for pictures in their order; an error that the others would meet too is raised."""

    def predict(self, paths: Iterable[Path], top_k: int) -> AsyncIterator[tuple[Path, Prediction | Bad]]:
        """Each of `paths` with its best classes."""

    def embed(self, paths: Iterable[Path], *, normalize: bool) -> AsyncIterator[tuple[Path, Embedding | Bad]]:
        """Each of `paths` with its embedding, scaled to length 1 if asked for."""

    async def overlay(self, path: Path, class_id: int | None, alpha: float | None) -> bytes:
        """The class activation map over the picture, as a PNG."""

    async def explain(self, path: Path, class_id: int | None) -> Explanation:
        """The class activation map in numbers."""

    async def models(self) -> list[dict[str, Any]]:
        """What `GET /models` tells of each model."""
