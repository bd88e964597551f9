"""What preprocessing makes of a picture. Cards have it, and reading cards must not take torch."""

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The model's input size; `crop` is the share of a picture's shorter side that the centre crop keeps."""

    height: int
    width: int
    crop: float
    interpolation: Interpolation
