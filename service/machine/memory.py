"""The memory of this process, as the kernel counts it, and what it holds of GPUs."""

import ctypes
import gc
from contextlib import suppress

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # 4 * 1024 * 1024 * sizeof(long), mallopt(3)
_BLOCK = 100 * 1024  # below the least mmap threshold, above FASTBIN_CONSOLIDATION_THRESHOLD

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
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)  # without the GIL, as every call through CDLL
        # It leaves what is free at the end of a thread's own arena, some 50 MB after a load: only a block of at least
        # 64 KB freed by that thread gives that back, if it is more than the threshold.
        libc.mallopt(_M_TRIM_THRESHOLD, 0)
        bytes(_BLOCK)
        # A set threshold no longer follows what is freed; these are the most that glibc would have let them grow to.
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
