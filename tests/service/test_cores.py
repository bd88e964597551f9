import os
from pathlib import Path

import pytest

from service import cores


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with eight cores by affinity and, so far, no cgroup quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in ("CGROUP_V2_QUOTA", "CGROUP_V1_QUOTA", "CGROUP_V1_PERIOD"):
        monkeypatch.setattr(cores, name, tmp_path / name)
    return tmp_path


@pytest.mark.usefixtures("cgroup")
def test_without_a_quota_the_affinity_counts() -> None:
    assert cores.usable_cores() == 8


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("350000 100000", 3), ("6400000 100000", 8)],
)
def test_a_v2_quota_bounds_the_cores(cgroup: Path, quota: str, expected: int) -> None:
    (cgroup / "CGROUP_V2_QUOTA").write_text(quota)

    assert cores.usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("100000", 1), ("400000", 4)])
def test_a_v1_quota_bounds_the_cores(cgroup: Path, quota: str, expected: int) -> None:
    (cgroup / "CGROUP_V1_QUOTA").write_text(quota)
    (cgroup / "CGROUP_V1_PERIOD").write_text("100000")

    assert cores.usable_cores() == expected


def test_a_quota_that_can_not_be_read_is_no_quota(cgroup: Path) -> None:
    (cgroup / "CGROUP_V2_QUOTA").write_text("what")

    assert cores.usable_cores() == 8
