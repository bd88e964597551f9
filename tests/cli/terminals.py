"""Commands on a terminal of their own: what people see, and what Ctrl-C does."""

import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import ioctl
from time import monotonic

from tests.conftest import ROOT


@dataclass
class OnTerminal:
    """A command whose standard input, output and error are one terminal; `seen` is what it has written so far."""

    process: subprocess.Popen[bytes]
    terminal: int
    seen: str = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What was written up to `text`; fails if it does not come."""
        end = monotonic() + seconds
        while text not in self.seen:
            if not self._read(end - monotonic()):
                raise AssertionError(f"no {text!r} in {self.seen!r}")
        return self.seen

    def ended(self, seconds: float = 60) -> int:
        """The exit code, once it has written all."""
        end = monotonic() + seconds
        while self._read(end - monotonic()):
            pass
        return self.process.wait(max(end - monotonic(), 1))

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.write(self.terminal, b"\x03")

    def _read(self, seconds: float) -> bool:
        ready, *_ = select.select([self.terminal], [], [], max(seconds, 0))
        try:
            data = os.read(self.terminal, 65_536) if ready else b""
        except OSError:  # EIO: the other end is closed
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)


@contextmanager
def on_terminal(*arguments: str, columns: int = 80, **environment: str) -> Iterator[OnTerminal]:
    """`pvt-serve` with `arguments` on a terminal of 40 lines."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    variables = {**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command(arguments), cwd=ROOT, env=variables | environment, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  Ctrl-C needs it
    )  # fmt: skip
    os.close(slave)
    try:
        yield OnTerminal(process, master)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(master)


def command(arguments: Sequence[str]) -> list[str]:
    """The command line that runs `pvt-serve` from the checkout."""
    return [sys.executable, "-m", "cli", *arguments]
