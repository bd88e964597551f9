"""The engine's options as one value object; `app.settings` fills it from the environment."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch

from service.backends.base import Backend, Precision
from service.backends.cpu import OpenVinoBackend, TorchBackend
from service.backends.cuda import IN_FLIGHT, CudaBackend, cuda_devices
from service.backends.cuda_compiling import TorchCompiler
from service.machine import usable_cores
from service.store.location import RemoteOptions

BackendName = Literal["auto", "openvino", "torch"]
MakeBackend = Callable[[], Backend]


@dataclass(frozen=True, slots=True)
class Budget:
    """`bytes` None: no limit. `min_residency_seconds` is how long what was loaded stays, against thrash.

    A load waits for room for `max_wait_seconds`, since most models are in use for milliseconds only.
    """

    bytes: int | None = None
    min_residency_seconds: float = 0.0
    max_wait_seconds: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes are images, times are seconds. `precision` None leaves it to the batch plan, `cache` None keeps no plan.

    `remote_store` takes the place of the folder `model_store`. `cold` says whether a request for a model that is not
    loaded waits; `reload_seconds` 0 never looks for new versions. `pull` fetches published weights when they are first
    requested, `mirror` is a base URL in place of their hosts. `devices` are the GPUs to use, by torch's names, none for
    the CPU; `compile` makes their graphs faster in the background. `memory_bytes` is what the process may take of the
    machine's memory in all; 0: no limit. `cache_bytes` of it are for the content cache; 0: there is none. Every
    `canary_seconds` each model has to prove itself; 0: never.
    """

    model_store: Path
    default_model: str
    remote_store: RemoteOptions | None = None
    preload: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)
    cold: Literal["wait", "refuse"] = "wait"
    reload_seconds: float = 0.0
    pull: bool = False
    mirror: str | None = None
    backend: BackendName = "auto"
    devices: tuple[str, ...] = ()
    compile: bool = True
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
    max_input_side: int = 1024
    sizes_per_model: int = 4
    max_map_bytes: int = 128_000_000
    max_body_bytes: int = 32_000_000
    memory_bytes: int = 0
    cache_bytes: int = 0
    stall_seconds: float = 30.0
    canary_seconds: float = 0.0

    @property
    def images_at_a_time(self) -> int:
        """As many as keep every thread busy: full batches, and images decoded meanwhile. The queue refuses more."""
        return min(self.instances * self.max_batch_size + self.cores, self.queue_size)


def default_instances(devices: Sequence[str], cores: int) -> int:
    """Batches at a time: one for each core, or as many as keep each of the GPUs busy."""
    return IN_FLIGHT * len(devices) or cores


def make_backends(options: EngineOptions) -> tuple[MakeBackend, ...]:
    """The backends to try, best first, each made when first called for and only once."""
    torch.set_num_threads(options.cores)  # loading uses torch too, which knows nothing of quotas
    openvino = cache(partial(OpenVinoBackend, options.instances))
    eager = cache(partial(TorchBackend, options.instances))
    on_cpu = {"auto": (openvino, eager), "openvino": (openvino,), "torch": (eager,)}[options.backend]
    return (cache(partial(_on_gpus, options)), *on_cpu) if options.devices else on_cpu


def _on_gpus(options: EngineOptions) -> Backend:
    # Half of the cores: the others decode. Without a cache a helper process could hand nothing on.
    compiler = TorchCompiler(options.cache, max(1, options.cores // 2)) if options.compile and options.cache else None
    return CudaBackend(cuda_devices(options.devices), options.instances, compiler)
