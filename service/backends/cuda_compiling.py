"""`torch.compile` for modules on a GPU: first in a helper process, then in this one, from the cache on disk.

Compiling kernels takes minutes, holds the interpreter lock, and synchronises the whole card, which no capture of a CUDA
graph survives. So a helper process does it: `python -m service.backends.cuda_compiling`, with the job on its standard
input. This process then traces the module and finds its kernels in the cache.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event
from time import monotonic, sleep
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from service.backends.base import Served

# torch.compile makes one form for each batch size, card, precision, input size and choice of stage maps; all count.
COMPILED_FORMS = 1 << 20
OPTIONS: Mapping[str, Any] = {"mode": "max-autotune-no-cudagraphs", "dynamic": False, "fullgraph": True}
HELPER_SECONDS = 1800.0  # for one batch size; a helper that takes longer hangs
_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
_POLL_SECONDS = 0.2
_NICENESS = 10  # decoding goes first
_ROOT = Path(__file__).parents[2]

Function = Callable[[Tensor], Sequence[Tensor]]


class Placed(nn.Module):
    """A served module that computes in `kind`: uint8 pixels in, float32 out, as the module itself.

    Tokens are channels last in any case; with weights of another format, convolutions convert them in every run.
    """

    def __init__(self, served: Served, kind: torch.dtype) -> None:
        super().__init__()
        self.served = served
        self.kind = kind
        self.served.model.to(kind).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as documented

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """As `Served.forward`."""
        images = self.served.normalised(pixels).to(self.kind, memory_format=torch.channels_last)
        return tuple(each.float() for each in self.served.outputs(images))


@dataclass(frozen=True, slots=True)
class Job:
    """What to compile: `module`, placed on `device` to compute in `kind`, for pixels of `shape`."""

    module: Served
    kind: torch.dtype
    shape: tuple[int, ...]
    device: str


@dataclass
class TorchCompiler:
    """`torch.compile` with all its optimizations but CUDA graphs, which `service.backends.cuda` captures.

    `cache` keeps what the helper compiled with `processes` processes; without one there is no helper.
    """

    cache: Path | None
    processes: int = 1
    options: Mapping[str, Any] = field(default_factory=lambda: OPTIONS)

    def prepare(self, job: Job, stopped: Event) -> None:
        """Compile the job in a helper process, if there is a cache; return early if `stopped` is set.

        Raises RuntimeError with the last line of a helper that failed, and TimeoutExpired for one that hung.
        """
        if self.cache is None:
            return
        blob = pickle.dumps((deepcopy(job.module).to("meta"), job.kind, job.shape, job.device, dict(self.options)))
        paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        environment = {**os.environ, **self._environment(self.cache), "PYTHONPATH": paths}
        # Several workers would compile the same at the same time. With the lock, the second finds it in the cache.
        with suppress(Timeout), FileLock(self.cache / "torch.lock").acquire(cancel_check=stopped.is_set):
            _help(blob, environment, stopped)

    def __call__(self, module: nn.Module) -> Function:
        """A placed module by `torch.compile`, with the helper's kernels; its first run may compile."""
        if self.cache:
            # One thread: all kernels are in the cache, and more would be idle processes beside this one.
            for name, value in {**self._environment(self.cache), _THREADS: "1"}.items():
                os.environ.setdefault(name, value)
        return _compiled(module, self.options)

    def _environment(self, cache: Path) -> dict[str, str]:
        """What the user has set stays. Triton's default cache is in a home folder, which a service may not have."""
        folders = {"TORCHINDUCTOR_CACHE_DIR": cache / "torch", "TRITON_CACHE_DIR": cache / "torch" / "triton"}
        named = {name: os.environ.get(name, str(folder)) for name, folder in folders.items()}
        return {**named, _THREADS: str(self.processes)}


def _help(blob: bytes, environment: Mapping[str, str], stopped: Event) -> None:
    """Run the pickled job `blob` in a helper process, until it is done or `stopped` is set."""
    with TemporaryFile() as job, TemporaryFile() as errors:
        job.write(blob)
        job.seek(0)
        command = [sys.executable, "-P", "-m", "service.backends.cuda_compiling"]
        with subprocess.Popen(command, stdin=job, stdout=subprocess.DEVNULL, stderr=errors, env=environment) as helper:  # noqa: S603
            try:
                ends = monotonic() + HELPER_SECONDS
                while helper.poll() is None:
                    if stopped.wait(_POLL_SECONDS):
                        return
                    if monotonic() > ends:
                        raise subprocess.TimeoutExpired(helper.args, HELPER_SECONDS)
            finally:
                helper.kill()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    if helper.returncode:
        raise RuntimeError(lines[-1] if lines else f"exit code {helper.returncode}")


def _compiled(module: nn.Module, options: Mapping[str, Any]) -> Function:
    dynamo = torch._dynamo.config  # noqa: SLF001  the documented place
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = COMPILED_FORMS
    return torch.compile(module, **options)


def set_up_cudnn() -> None:
    """Settings of the process that serves and of the helper, so that the helper times what will run."""
    torch.backends.cudnn.benchmark = True  # shapes are fixed, and a capture keeps the choice
    torch.backends.cudnn.allow_tf32 = False  # float32 is used where a reduced precision was too far off


def main() -> None:
    """Compile the job on standard input, which puts its kernels into the cache; end when the parent ends."""
    os.nice(_NICENESS)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    set_up_cudnn()
    module, kind, shape, device, options = pickle.loads(sys.stdin.buffer.read())  # noqa: S301  our parent wrote it
    placed = Placed(module.to_empty(device=device), kind).eval()
    with torch.no_grad():
        _compiled(placed, options)(torch.zeros(shape, dtype=torch.uint8, device=device))


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
