"""What the engine can be told, as one value object; `app.settings` fills it from the environment."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from service.backends.base import Backend, Precision
from service.backends.openvino import OpenVinoBackend
from service.cores import usable_cores

BackendName = Literal["auto", "openvino", "torch"]
MakeBackend = Callable[[], Backend]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes are images, times are seconds. `precision` None leaves it to the batch plan, `cache` None keeps no plan."""

    model_store: Path
    default_model: str
    preload: tuple[str, ...] = ()
    backend: BackendName = "auto"
    precision: Precision | None = None
    instances: int = field(default_factory=usable_cores)
    cores: int = field(default_factory=usable_cores)
    cache: Path | None = None
    max_batch_size: int = 8
    max_batch_delay_seconds: float = 0.0
    queue_size: int = 256
    timeout_seconds: float = 30.0
    max_image_pixels: int = 50_000_000
    scaled_jpeg: bool = True
    max_images: int = 64
    stall_seconds: float = 30.0


def make_backends(options: EngineOptions) -> tuple[MakeBackend, ...]:
    """The backends to try, best first, each made when first called for and only once."""

    def openvino() -> Backend:
        return OpenVinoBackend(options.instances)

    def torch() -> Backend:
        from service.backends.torch import TorchBackend  # noqa: PLC0415  the import takes a second or two

        return TorchBackend(options.instances)

    choices: dict[BackendName, tuple[MakeBackend, ...]] = {
        "auto": (cache(openvino), cache(torch)),
        "openvino": (cache(openvino),),
        "torch": (cache(torch),),
    }
    return choices[options.backend]
