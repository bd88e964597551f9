"""What this process may use of the machine: cores, and memory as the kernel counts it."""

import ctypes
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

import psutil

CGROUPS = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # 4 * 1024 * 1024 * sizeof(long), mallopt(3)
_BLOCK = 100 * 1024  # below the least mmap threshold, above FASTBIN_CONSOLIDATION_THRESHOLD

T = TypeVar("T")

_process = psutil.Process()


def usable_cores() -> int:
    """Cores by scheduling affinity and by the CPU quotas of the cgroup and those around it; at least 1.

    A quota is rounded down: two threads on a quota of 1.5 cores use it up in three quarters of each period and then
    both stand still for the rest, while one leaves half a core to the rest of the process.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *map(int, _quotas())]))


def share(total: int, index: int, parts: int) -> int:
    """The share of part `index` of `parts` in `total`, as even as whole numbers allow; at least 1."""
    return max(1, total // parts + (index < total % parts))


def memory_limit_bytes() -> int:
    """The least memory limit of the cgroup and of those around it; what the machine has, where that is less.

    `memory.high` counts too: beyond it the kernel slows a process down until it hardly moves. See
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory and
    https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
    """
    limits = [psutil.virtual_memory().total]
    for kind, folder in _cgroups("memory"):
        names = ("memory.max", "memory.high") if kind == "cgroup2" else ("memory.limit_in_bytes",)
        for name in names:
            text = "".join(_lines(folder / name))
            if text.isdecimal() and int(text) > 0:  # else "max", or what is no number
                limits.append(int(text))
    return min(limits)


def _quotas() -> Iterator[float]:
    """Every CPU quota that holds for this process, in cores: of its own cgroup and of each around it."""
    for kind, folder in _cgroups("cpu"):
        with suppress(ValueError, ZeroDivisionError):  # "max", or what is no number
            quota, period = _quota(kind, folder)
            if quota > 0:
                yield quota / period


def _cgroups(controller: str) -> Iterator[tuple[str, Path]]:
    """The folders of this process's cgroup and of each around it, each with its kind, for `controller`.

    Of both versions, since the controller may be in either. See proc_pid_mountinfo(5) for the fields.
    """
    for line in _lines(MOUNTS):
        fields, _, rest = line.partition(" - ")
        try:
            _, _, _, root, mounted, *_ = fields.split()
            kind, _, options = rest.split(maxsplit=2)
        except ValueError:
            continue
        if kind != "cgroup2" and (kind != "cgroup" or controller not in options.split(",")):
            continue
        point, cgroup = Path(mounted.encode().decode("unicode_escape")), _cgroup(kind, controller)  # "\040": a space
        # In a container that shows only a part of the hierarchy, the root of that part stands for the cgroup.
        inside = ".." not in cgroup.parts and cgroup.is_relative_to(root)
        own = point / cgroup.relative_to(root) if inside else point
        for folder in (own, *own.parents):
            if not folder.is_relative_to(point):
                break
            yield kind, folder


def _cgroup(kind: str, controller: str) -> PurePosixPath:
    """The path of this process in the hierarchy of version 2, or in that of version 1's `controller`: cgroups(7)."""
    for line in _lines(CGROUPS):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (hierarchy == "0" and not controllers) if kind == "cgroup2" else controller in controllers.split(","):
            return PurePosixPath(path or "/")
    return PurePosixPath("/")


def _quota(kind: str, folder: Path) -> tuple[int, int]:
    """The quota in `folder` and its period; ValueError if there is none.

    See https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu and https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    if kind == "cgroup2":
        quota, period, *_ = [*"".join(_lines(folder / "cpu.max")).split(), "100000"]
    else:
        quota, period = ("".join(_lines(folder / name)) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return int(quota), int(period)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []


def resident_bytes() -> int:
    """Resident memory, with freed memory that the allocator keeps."""
    return int(_process.memory_info().rss)


def peak_of(function: Callable[[], T]) -> tuple[T, int]:
    """What `function` returns, and how far resident memory rose meanwhile, for whatever reason.

    Linux keeps the highest (`VmHWM`), and forgets it on request: proc_pid_clear_refs(5). Elsewhere, what it is now.
    """
    give_back()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes()
    result = function()
    lines = [line.split() for line in _lines(Path("/proc/self/status"))]
    peaks = [int(line[1]) * 1024 for line in lines if line and line[0] == "VmHWM:"]
    return result, max(0, *peaks, resident_bytes()) - before


def held_bytes() -> int:
    """Resident memory and, on GPUs, the memory that torch reserves there."""
    import torch  # noqa: PLC0415  not the supervisor of several workers, which takes no such memory

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return resident_bytes() + sum(torch.cuda.memory_reserved(i) for i in gpus)


def gpu_memory(names: Sequence[str]) -> dict[tuple[str, ...], float]:
    """Bytes of each GPU of those `names`: `used`, by whatever process, and `total`; none of a card that has failed."""
    import torch  # noqa: PLC0415  as above

    found: dict[tuple[str, ...], float] = {}
    for name in names:
        with suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info(name)
            found |= {(name, "used"): total - free, (name, "total"): total}
    return found


def gpu_utilization(names: Sequence[str]) -> dict[tuple[str, ...], float]:
    """The share of the last moments in which each GPU computed; torch needs the package nvidia-ml-py to know it."""
    import torch  # noqa: PLC0415  as above

    found: dict[tuple[str, ...], float] = {}
    for name in names:
        with suppress(ModuleNotFoundError, RuntimeError):
            found[name,] = torch.cuda.utilization(name) / 100
    return found


def trim() -> None:
    """Return the pages of freed memory to the kernel, of all threads; without the GIL. Does nothing without glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def give_back() -> None:
    """Collect garbage, and make torch and glibc return the memory they keep; takes some tens of milliseconds."""
    import torch  # noqa: PLC0415  as above

    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # raised again by a card that has failed, which does not concern models on the CPU
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # noqa: SLF001  pinned memory, for which there is no public way
    trim()
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # It keeps what is free at the end of this thread's arena, some 50 MB after a load: only when the thread frees
        # a block of at least 64 KB is that returned, if it is more than the threshold.
        libc.mallopt(_M_TRIM_THRESHOLD, 0)
        bytes(_BLOCK)
        # A set threshold no longer follows what is freed; these are the most that glibc would have let them grow to.
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
