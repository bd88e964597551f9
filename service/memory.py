"""The memory of this process, as the kernel counts it."""

import ctypes
import gc
from contextlib import suppress

import psutil

_process = psutil.Process()


def resident_bytes() -> int:
    """What it holds now, freed memory that the allocator keeps included."""
    return int(_process.memory_info().rss)


def settled_bytes() -> int:
    """What it holds once all that is free has gone back to the kernel; takes some tens of milliseconds."""
    give_back()
    return resident_bytes()


def give_back() -> None:
    """Collect what is unreachable, and have glibc return what it keeps; another C library keeps it."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # without the GIL, as every call through CDLL
