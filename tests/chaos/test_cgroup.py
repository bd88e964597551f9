"""The tool that the other tests of this folder use does what it says."""

import subprocess
import sys

from tests.chaos.cgroup import memory_limit


def test_a_process_beyond_the_limit_is_killed_and_counted() -> None:
    with memory_limit(200_000_000) as group:
        command = [*group.prefix, sys.executable, "-c", "print(len(bytearray(400_000_000)))"]
        process = subprocess.run(command, capture_output=True, text=True, check=False)

        assert process.returncode == -9
        assert group.killed() == 1
        assert 150_000_000 < group.peak_bytes() <= 200_000_000


def test_a_process_within_the_limit_goes_on() -> None:
    with memory_limit(200_000_000) as group:
        command = [*group.prefix, sys.executable, "-c", "print(len(bytearray(50_000_000)))"]
        process = subprocess.run(command, capture_output=True, text=True, check=True)

        assert process.stdout == "50000000\n"
        assert group.killed() == 0
