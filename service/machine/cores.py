"""How many cores this process may really use."""

import os
from collections.abc import Iterator
from math import floor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

CGROUPS = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")


class _Mount(NamedTuple):
    """A mounted hierarchy that may hold CPU quotas: its version, the cgroup at its root, and where it is mounted."""

    version: int
    root: PurePosixPath
    point: Path


def usable_cores() -> int:
    """Cores by scheduling affinity and by the CPU quotas of the cgroup and those around it; at least 1.

    A quota is rounded down: two threads on a quota of 1.5 cores use it up in three quarters of each period and then
    both stand still for the rest, while one leaves half a core to the rest of the process.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *map(floor, _quotas())]))


def share(total: int, index: int, parts: int) -> int:
    """The share of part `index` of `parts` in `total`, as even as whole numbers allow; at least 1."""
    return max(1, total // parts + (index < total % parts))


def _quotas() -> Iterator[float]:
    """Every CPU quota that holds for this process, in cores.

    A process is bound by the quota of its own cgroup and by that of each around it, so all up to the root of the mount
    count. On a hybrid machine the controller is in one of the two versions; the other has no such files.
    """
    for mount in _mounts():
        own = _below(mount, _cgroup(mount.version))
        for folder in (own, *own.parents):
            if not folder.is_relative_to(mount.point):
                break
            quota = _v2(folder) if mount.version == 2 else _v1(folder)  # noqa: PLR2004
            if quota is not None:
                yield quota


def _mounts() -> Iterator[_Mount]:
    """See proc_pid_mountinfo(5): root and mount point are the fourth and fifth field, the type comes after a hyphen."""
    for line in _lines(MOUNTS):
        fields, _, rest = line.partition(" - ")
        try:
            _, _, _, root, point, *_ = fields.split()
            kind, _, options = rest.split(maxsplit=2)
        except ValueError:
            continue
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            version = 2 if kind == "cgroup2" else 1
            yield _Mount(version, PurePosixPath(root), Path(point.encode().decode("unicode_escape")))  # "\040": a space


def _cgroup(version: int) -> PurePosixPath:
    """The path of this process in the hierarchy of version 2, or in that of version 1's CPU controller: cgroups(7)."""
    for line in _lines(CGROUPS):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (hierarchy == "0" and not controllers) if version == 2 else "cpu" in controllers.split(","):  # noqa: PLR2004
            return PurePosixPath(path or "/")
    return PurePosixPath("/")


def _below(mount: _Mount, cgroup: PurePosixPath) -> Path:
    """The folder of `cgroup`; in a container that shows only a part of the hierarchy, the root of that part."""
    if ".." in cgroup.parts or not cgroup.is_relative_to(mount.root):
        return mount.point
    return mount.point / cgroup.relative_to(mount.root)


def _v2(folder: Path) -> float | None:
    """See https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu."""
    return _cores(*(next(iter(_lines(folder / "cpu.max")), "").split()))


def _v1(folder: Path) -> float | None:
    """See https://docs.kernel.org/scheduler/sched-bwc.html."""
    quota, period = ("".join(_lines(folder / name)) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return _cores(quota, period)


def _cores(quota: str = "max", period: str = "100000", *_: str) -> float | None:
    """A quota in cores; None for no limit, and for what is not a number."""
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []
