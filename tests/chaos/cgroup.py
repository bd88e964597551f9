"""A memory cgroup for a server: what goes beyond its limit is killed by the kernel, as in a container."""

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
V1 = ROOT / "memory"


@dataclass(frozen=True)
class Group:
    """One cgroup. `prefix` is a command that moves itself into the group and then becomes what follows it."""

    folder: Path
    version: int

    @property
    def prefix(self) -> list[str]:
        return ["sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh"]

    def peak_bytes(self) -> int:
        """The most memory that was in use at once."""
        return self._read("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")

    def killed(self) -> int:
        """How often the kernel ended a process for want of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        fields = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(fields["oom_kill"])

    def _read(self, name: str) -> int:
        return int((self.folder / name).read_text())

    def close(self) -> None:
        """Kill what is left in it, and remove it."""
        for pid in (self.folder / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(int(pid), 0)
        self.folder.rmdir()


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Group]:
    """A cgroup whose processes have `limit_bytes` together; skips the test where this process may make none."""
    version = 1 if V1.is_dir() else 2
    folder = (V1 if version == 1 else ROOT) / f"pvt-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        name = "memory.limit_in_bytes" if version == 1 else "memory.max"
        (folder / name).write_text(str(limit_bytes))
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made on this machine: {error}")
    group = Group(folder, version)
    try:
        yield group
    finally:
        group.close()
