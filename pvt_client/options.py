"""What can be asked for with a picture; what is left out is up to the service."""

from collections.abc import Sequence
from typing import Literal, TypedDict


class _Common(TypedDict, total=False):
    model: str | None
    """`<variant>.<tag>`, a variant alone, or an alias; the service's default model if left out."""
    size: int | tuple[int, int] | str | None
    """Side of the square model input in pixels, or its height and width (also as `"256x384"`); multiples of 32. The
    model's own if left out."""


class PredictOptions(_Common, total=False):
    """Options of `predict`."""

    top_k: int
    """How many classes to name, best first; 5 if left out."""


class FeaturesOptions(_Common, total=False):
    """Options of `features`."""

    stages: Sequence[int]
    """The stages of the pyramid to give, 1 to 4; none if left out."""
    pool: Literal["avg", "none"]
    """Whether stages come as means over their maps."""
    normalize: bool
    """Whether vectors are scaled to length 1."""
    dtype: Literal["float32", "float16"]
    """What arrays are made of."""


class MapOptions(_Common, total=False):
    """Options of `explain_map`."""

    class_id: int | None
    """The class to explain; the best one if left out."""


class ExplainOptions(MapOptions, total=False):
    """Options of `explain`."""

    alpha: float | None
    """How much of the overlay is colour, 0 to 1."""
