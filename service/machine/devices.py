"""Which GPUs there are, which of them are to be used, and whether they work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from service.errors import BackendUnavailable, DeviceFailed


class DeviceHealth:
    """The one place that knows whether a GPU failed; from then on none is expected to work. From any thread."""

    def __init__(self) -> None:
        # Mutable state: the first failure; empty while there is none.
        self.failure = ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note a `DeviceFailed` that the block raises, if it is the first."""
        try:
            yield
        except DeviceFailed as error:
            self.failure = self.failure or str(error)
            raise


def visible() -> tuple[str, ...]:
    """The GPUs that this torch can use, by its names: `cuda:0` and so on."""
    return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()


def choose(setting: str, present: Sequence[str]) -> tuple[str, ...]:
    """The GPUs of those `present` that the setting selects; empty for the CPU.

    `setting` is `cpu`, `cuda` for every GPU, `auto` for every GPU if there are any, or names separated by commas.

    Raises:
        BackendUnavailable: it names a GPU that is missing; the message says what to do.
    """
    if setting in {"auto", "cpu"}:
        return tuple(present) if setting == "auto" else ()
    names = tuple(present) or ("cuda:0",) if setting == "cuda" else tuple(dict.fromkeys(setting.split(",")))
    missing = [name for name in names if name not in present]
    if missing:
        seen = f"sees {', '.join(present)}" if present else "sees none"
        raise BackendUnavailable(
            f"PVT_DEVICE={setting}: torch {torch.__version__} {seen}, not {', '.join(missing)}; set PVT_DEVICE=cpu, or "
            "install a CUDA build of torch (docs/gpu.md) and check the driver with nvidia-smi"
        )
    return names
