"""Where commands run a model, in this process or in a service at a URL, and what both do for them."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pvt_client import Embedding, Explanation, Prediction, PvtError
from service.errors import ServiceError

Failure = PvtError | ServiceError | OSError
"""Why there is no result for one image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where to run which model, and at which input size. `url` None: this process."""

    url: str | None = None
    api_key: str | None = None
    model: str | None = None
    size: str | None = None
    concurrency: int = 8


class Inference(Protocol):
    """Results for images, in their order; an error that every image would meet is raised."""

    def predict(self, paths: Iterable[Path], top_k: int) -> AsyncIterator[tuple[Path, Prediction | Failure]]:
        """Each of `paths` with its best classes."""

    def embed(self, paths: Iterable[Path], *, normalize: bool) -> AsyncIterator[tuple[Path, Embedding | Failure]]:
        """Each of `paths` with its embedding, scaled to length 1 if `normalize`."""

    async def overlay(self, path: Path, class_id: int | None, alpha: float | None) -> bytes:
        """The class activation map over the image, as a PNG."""

    async def explain(self, path: Path, class_id: int | None) -> Explanation:
        """The class activation map in numbers."""

    async def models(self) -> list[dict[str, Any]]:
        """The models, each as `GET /models` describes it."""
