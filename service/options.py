"""What the engine can be told, as one value object; `app.settings` fills it from the environment."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from service.backends.base import Backend, Precision
from service.backends.openvino import OpenVinoBackend
from service.backends.torch import TorchBackend
from service.cores import usable_cores

BackendName = Literal["openvino", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes are images, times are seconds. `precision` None leaves it to the backend."""

    model_store: Path
    default_model: str
    preload: tuple[str, ...] = ()
    backend: BackendName = "openvino"
    precision: Precision | None = None
    instances: int = field(default_factory=usable_cores)
    cores: int = field(default_factory=usable_cores)
    max_batch_size: int = 8
    max_batch_delay_seconds: float = 0.0
    queue_size: int = 256
    timeout_seconds: float = 30.0
    max_image_pixels: int = 50_000_000
    max_images: int = 64
    stall_seconds: float = 30.0


def make_backend(options: EngineOptions) -> Backend:
    """The backend that `options` ask for, with the cores shared out among its instances."""
    threads = max(1, options.cores // options.instances)
    torch.set_num_threads(options.cores)  # loading uses torch too, which knows nothing of quotas
    match options.backend:
        case "openvino":
            return OpenVinoBackend(options.instances, threads, options.precision)
        case "torch":
            return TorchBackend(options.instances, threads, options.precision)
