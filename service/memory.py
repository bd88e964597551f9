"""The memory of this process, as the kernel counts it, and what it holds of GPUs."""

import ctypes
import gc
from contextlib import suppress

import psutil
import torch

_process = psutil.Process()


def resident_bytes() -> int:
    """What it holds now, freed memory that the allocator keeps included."""
    return int(_process.memory_info().rss)


def held_bytes() -> int:
    """The same and, on GPUs, what torch holds there."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return resident_bytes() + sum(torch.cuda.memory_reserved(i) for i in gpus)


def settled_bytes() -> int:
    """What it holds resident once all that is free has gone back to the kernel; takes some tens of milliseconds."""
    give_back()
    return resident_bytes()


def give_back() -> None:
    """Collect what is unreachable, and have torch and glibc return what they keep; another C library keeps it."""
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a card that has failed says so here too, and models on the CPU are none of that
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # noqa: SLF001  pinned memory, for which there is no public way
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # without the GIL, as every call through CDLL
