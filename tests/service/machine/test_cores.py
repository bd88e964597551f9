import os
from pathlib import Path

import pytest

from service.machine import share, usable_cores

V2 = "30 23 0:26 {root} {point} ro,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "31 23 0:27 {root} {point} rw - cgroup cgroup rw,cpu,cpuacct"
OTHER = "32 23 0:28 / {point} rw - cgroup cgroup rw,memory"


class Machine:
    """Eight cores by affinity, and a tree of cgroups that a test makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounts: list[str] = ["22 1 8:1 / / rw - ext4 /dev/sda1 rw", "not a mount"]

    def mount(self, line: str, name: str, root: str = "/") -> None:
        self.mounts.append(line.format(root=root, point=self.folder / name))
        (self.folder / "mountinfo").write_text("\n".join(self.mounts))

    def processes(self, *lines: str) -> None:
        (self.folder / "cgroup").write_text("\n".join(lines))

    def v2(self, path: str, quota: str) -> None:
        self._write(f"{path}/cpu.max", quota)

    def v1(self, path: str, quota: str, period: str = "100000") -> None:
        self._write(f"{path}/cpu.cfs_quota_us", quota)
        self._write(f"{path}/cpu.cfs_period_us", period)

    def _write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("service.machine.CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("service.machine.MOUNTS", tmp_path / "mountinfo")
    return Machine(tmp_path)


@pytest.mark.usefixtures("machine")
def test_without_cgroups_the_affinity_counts() -> None:
    assert usable_cores() == 8


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("50000 100000", 1),
        ("150000 100000", 1),
        ("350000 100000", 3),
        ("6400000 100000", 8),
        ("20000 10000", 2),
        ("300000", 3),
    ],
)
def test_a_v2_quota_bounds_the_cores_rounded_down(machine: Machine, quota: str, expected: int) -> None:
    machine.mount(V2, "unified")
    machine.processes("0::/")
    machine.v2("unified", quota)

    assert usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("100000", 1), ("400000", 4), ("0", 8)])
def test_a_v1_quota_bounds_the_cores(machine: Machine, quota: str, expected: int) -> None:
    machine.mount(OTHER, "memory")
    machine.mount(V1, "cpu,cpuacct")
    machine.processes("9:memory:/docker/abc", "4:cpu,cpuacct:/")
    machine.v1("cpu,cpuacct", quota)

    assert usable_cores() == expected


@pytest.mark.parametrize(
    ("own", "middle", "outer", "expected"),
    [
        ("400000", "max", "200000", 2),
        ("max", "300000", "max", 3),
        ("100000", "300000", "200000", 1),
        ("max",) * 3 + (8,),
    ],
)
def test_of_nested_cgroups_the_smallest_quota_counts(
    machine: Machine, own: str, middle: str, outer: str, expected: int
) -> None:
    machine.mount(V2, "unified")
    machine.processes("0::/kubepods/pod1/container")
    machine.v2("unified/kubepods/pod1/container", f"{own} 100000")
    machine.v2("unified/kubepods/pod1", f"{middle} 100000")
    machine.v2("unified/kubepods", f"{outer} 100000")

    assert usable_cores() == expected


def test_nested_v1_cgroups_count_too(machine: Machine) -> None:
    machine.mount(V1, "cpu")
    machine.processes("4:cpu,cpuacct:/docker/abc")
    machine.v1("cpu/docker/abc", "-1")
    machine.v1("cpu/docker", "200000")

    assert usable_cores() == 2


@pytest.mark.parametrize("cgroup", ["/docker/abc", "/docker/abc/inner", "/somewhere/else", "/../../docker/abc"])
def test_a_container_that_sees_only_its_own_part_of_the_tree(machine: Machine, cgroup: str) -> None:
    machine.mount(V1, "cpu", root="/docker/abc")
    machine.processes(f"4:cpu,cpuacct:{cgroup}")
    machine.v1("cpu", "200000")

    assert usable_cores() == 2


def test_on_a_hybrid_machine_the_version_with_the_controller_counts(machine: Machine) -> None:
    machine.mount(V1, "cpu")
    machine.mount(V2, "unified")
    machine.processes("4:cpu,cpuacct:/a", "0::/b")
    machine.v1("cpu/a", "300000")
    (machine.folder / "unified/b").mkdir(parents=True)

    assert usable_cores() == 3


@pytest.mark.parametrize("quota", ["what", "", "100000 0", "100000 many", "\xff"])
def test_a_quota_that_can_not_be_read_is_no_quota(machine: Machine, quota: str) -> None:
    machine.mount(V2, "unified")
    machine.mount(V1, "cpu")
    machine.processes("garbage", "0::/", "4:cpu:/")
    machine.v2("unified", quota)
    machine.v1("cpu", quota)

    assert usable_cores() == 8


def test_a_mount_point_with_a_space_is_found(machine: Machine) -> None:
    machine.mount(V2, "two\\040words")
    machine.processes("0::/")
    machine.v2("two words", "200000 100000")

    assert usable_cores() == 2


@pytest.mark.parametrize(
    ("total", "parts", "shares"), [(8, 1, [8]), (8, 3, [3, 3, 2]), (2, 4, [1, 1, 1, 1]), (5, 2, [3, 2])]
)
def test_shares_add_up_wherever_each_gets_one(total: int, parts: int, shares: list[int]) -> None:
    assert [share(total, index, parts) for index in range(parts)] == shares


def test_a_v1_period_alone_is_no_quota(machine: Machine) -> None:
    machine.mount(V1, "cpu")
    machine.processes("4:cpu:/")
    machine.v1("cpu", "100000")
    (machine.folder / "cpu/cpu.cfs_quota_us").unlink()

    assert usable_cores() == 8
