"""The memory that the container leaves."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from service.machine import memory_limit_bytes
from tests.service.machine.test_cores import OTHER, V2, Machine

GB = 1_000_000_000


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setattr("service.machine.psutil.virtual_memory", lambda: SimpleNamespace(total=8 * GB))
    monkeypatch.setattr("service.machine.CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("service.machine.MOUNTS", tmp_path / "mountinfo")
    return Machine(tmp_path)


def limit(machine: Machine, name: str, text: str) -> None:
    file = machine.folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


@pytest.mark.usefixtures("machine")
def test_without_cgroups_the_machine_counts() -> None:
    assert memory_limit_bytes() == 8 * GB


@pytest.mark.parametrize(("high", "most", "expected"), [
    ("max", "max", 8 * GB), ("max", str(GB), GB), (str(GB), str(2 * GB), GB), ("max", str(9 * GB), 8 * GB),
    ("x", "", 8 * GB),
])  # fmt: skip
def test_a_v2_limit_bounds_the_memory(machine: Machine, high: str, most: str, expected: int) -> None:
    machine.mount(V2, "unified")
    machine.processes("0::/pod/main")
    limit(machine, "unified/pod/main/memory.max", most)
    limit(machine, "unified/pod/main/memory.high", high)

    assert memory_limit_bytes() == expected


def test_the_least_limit_on_the_way_to_the_root_counts(machine: Machine) -> None:
    machine.mount(V2, "unified")
    machine.processes("0::/pod/main")
    limit(machine, "unified/pod/main/memory.max", str(3 * GB))
    limit(machine, "unified/pod/memory.max", str(2 * GB))

    assert memory_limit_bytes() == 2 * GB


@pytest.mark.parametrize(("text", "expected"), [("9223372036854771712", 8 * GB), (str(GB), GB), ("-1", 8 * GB)])
def test_a_v1_limit_bounds_the_memory(machine: Machine, text: str, expected: int) -> None:
    machine.mount(OTHER, "memory")
    machine.processes("9:memory:/docker/abc", "4:cpu,cpuacct:/other")
    limit(machine, "memory/docker/abc/memory.limit_in_bytes", text)

    assert memory_limit_bytes() == expected
