"""Where commands run a model: in this process, or in a service at a URL. Commands do not know which."""

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol, Unpack

from pvt_client import AsyncClient, Embedding, Explanation, Model, Prediction, PvtError
from pvt_client.calls import ExplainOptions, FeaturesOptions, MapOptions, PredictOptions
from service.errors import ServiceError

_TIMEOUT_SECONDS = 600.0
Failure = PvtError | ServiceError
"""Why there is no result for one image."""


class Inference(Protocol):
    """The methods of `pvt_client.AsyncClient` that commands use."""

    def predict_many(
        self, images: Iterable[Path], *, concurrency: int = 8, **options: Unpack[PredictOptions]
    ) -> AsyncIterator[tuple[Path, Prediction | Failure]]:
        """Each of `images` with its best classes, in order; an error that every image would meet is raised."""

    def embedding_many(
        self, images: Iterable[Path], *, concurrency: int = 8, **options: Unpack[FeaturesOptions]
    ) -> AsyncIterator[tuple[Path, Embedding | Failure]]:
        """Each of `images` with its embedding, in the same way."""

    async def explain(self, image: Path, /, **options: Unpack[ExplainOptions]) -> bytes:
        """The class activation map over the image, as a PNG."""

    async def explain_map(self, image: Path, /, **options: Unpack[MapOptions]) -> Explanation:
        """The class activation map in numbers."""

    async def models(self) -> list[Model]:
        """Every model, as `GET /models` describes it."""


Connection = AbstractAsyncContextManager[Inference]


@asynccontextmanager
async def connect(url: str | None, api_key: str | None) -> AsyncIterator[Inference]:
    """The service at `url`, or without one an engine in this process, for as long as the context lasts."""
    if url is None:
        from cli.local import local_engine  # noqa: PLC0415  imports torch, which --url and --help do not need

        async with local_engine() as engine:
            yield engine
    else:
        async with AsyncClient(url, api_key=api_key, timeout=_TIMEOUT_SECONDS) as client:
            yield client
