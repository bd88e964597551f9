"""The memory of this process, as the kernel counts it, and its memory on GPUs."""

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
    """Resident memory, with freed memory that the allocator keeps."""
    return int(_process.memory_info().rss)


def held_bytes() -> int:
    """Resident memory and, on GPUs, the memory that torch reserves there."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return resident_bytes() + sum(torch.cuda.memory_reserved(i) for i in gpus)


def settled_bytes() -> int:
    """Resident memory once all free memory has gone back to the kernel; takes some tens of milliseconds."""
    give_back()
    return resident_bytes()


def give_back() -> None:
    """Collect garbage, and make torch and glibc return the memory they keep; other C libraries keep it."""
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # raised again by a card that has failed, which does not concern models on the CPU
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # noqa: SLF001  pinned memory, for which there is no public way
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)  # without the GIL, as every call through CDLL
        # It keeps what is free at the end of this thread's arena, some 50 MB after a load: only when the thread frees
        # a block of at least 64 KB is that returned, if it is more than the threshold.
        libc.mallopt(_M_TRIM_THRESHOLD, 0)
        bytes(_BLOCK)
        # A set threshold no longer follows what is freed; these are the most that glibc would have let them grow to.
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
