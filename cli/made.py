"""How embeddings were made: those of one table must be comparable."""

from dataclasses import asdict, dataclass
from typing import Any

from pvt_client.answers import Embedding


class BrokenTable(Exception):
    """A file that should hold embeddings and does not; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """By which model and in which way; `size` None: the model's own."""

    model: str
    version: str
    dimensions: int
    size: str | None
    normalize: bool

    @classmethod
    def of(cls, embedding: Embedding, size: str | None, *, normalize: bool) -> "Made":
        """How `embedding` was made."""
        return cls(
            model=embedding.model,
            version=embedding.version,
            dimensions=len(embedding.vector),
            size=size,
            normalize=normalize,
        )

    def fields(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def __str__(self) -> str:
        size = "" if self.size is None else f", size {self.size}"
        return f"{self.model}@{self.version}{size}{', normalized' if self.normalize else ''}"
