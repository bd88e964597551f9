"""Log lines, written by a thread of their own."""

import logging
import os
import threading
from collections import deque
from contextlib import suppress

GATHER_SECONDS = 0.02
MAX_WAITING_BYTES = 4_000_000
FLUSH_SECONDS = 2.0


class LineWriter:
    """Takes lines from any thread without ever waiting for the file, and writes those of a while at once.

    A file that takes none, such as a pipe that nobody reads, holds up neither the event loop nor the exit: what waits
    is bounded, what exceeds the bound is dropped, and how many lines that were is written once there is room again. A
    process that is killed loses the lines of its last GATHER_SECONDS.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._idle = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        # Mutable state: the lines that wait, their bytes, and how many were dropped.
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        self._idle.set()
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Take `line`, which ends with a newline."""
        with self._lock:
            if self._bytes + len(line) > MAX_WAITING_BYTES:
                self._dropped += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
            if len(self._lines) == 1:
                self._idle.clear()
                self._some.set()

    def flush(self) -> None:
        """Wait until all is written, or for FLUSH_SECONDS when it can't be."""
        self._hurry.set()
        self._idle.wait(FLUSH_SECONDS)
        self._hurry.clear()

    def _run(self) -> None:
        while True:
            self._some.wait()
            self._hurry.wait(GATHER_SECONDS)
            with self._lock:
                if not self._lines:
                    self._some.clear()
                    self._idle.set()
                    continue
                # What waits keeps counting until it is written.
                batch, size = b"".join(self._lines), self._bytes
                self._lines.clear()
            self._write(batch)
            with self._lock:
                self._bytes -= size
                if self._dropped:
                    told = b'{"component":"log","event":"lines_dropped","level":"warning","lines":%d}\n' % self._dropped
                    self._dropped = 0
                    self._lines.append(told)
                    self._bytes += len(told)

    def _write(self, batch: bytes) -> None:
        rest = memoryview(batch)
        with suppress(OSError):  # a closed pipe: there is nobody left to tell
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


class LineHandler(logging.Handler):
    """Gives the standard library's records to a LineWriter."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            self._writer.write(self.format(record).encode() + b"\n")
        except Exception:  # noqa: BLE001  as the standard library's own handlers do
            self.handleError(record)

    def flush(self) -> None:
        """See `logging.Handler`; the standard library calls it at exit."""
        self._writer.flush()


class LineLogger:
    """What structlog writes its own finished lines to."""

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer

    def msg(self, message: bytes) -> None:
        """Write a line."""
        self._writer.write(message + b"\n")

    log = debug = info = warning = warn = error = critical = exception = fatal = failure = err = msg
