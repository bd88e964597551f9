"""Logs: one line an event, JSON for machines or text for people, from us and from uvicorn alike.

A thread writes them. The standard library's QueueHandler and QueueListener do not replace it: see decision 23 in
docs/architecture.md.
"""

import logging
import os
import sys
import threading
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Literal

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

GATHER_SECONDS = 0.02
MAX_WAITING_BYTES = 4_000_000
FLUSH_SECONDS = 2.0


def configure(log_format: Literal["json", "console"], worker: int | None = None) -> None:
    """Send every log line of the process to standard error in `log_format`, with the number of the `worker`, if any.

    Our own lines, one a request, go there directly; those of libraries come through the standard library's logging.
    """
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([] if worker is None else [partial(_with_worker, worker)]),
    ]
    if log_format == "json":
        # Without the frames' variables: keys and images are among them.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        last: list[Processor] = [structlog.processors.ExceptionRenderer(tracebacks), _json]
    else:
        last = [
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
            _encoded,
        ]
    writer = LogWriter(sys.stderr.fileno())
    structlog.configure(
        processors=[*shared, *last],
        logger_factory=lambda *_: _Logger(writer),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    handler = LogHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last, _decoded],
        )
    )
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it reports every change of a folder
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


class LogWriter:
    """Takes lines from any thread without ever waiting for the file; a thread writes those of a short while at once.

    A file that takes none, such as a pipe that nobody reads, holds up neither the event loop nor the exit: what waits
    is bounded, what exceeds the bound is dropped, and the number of dropped lines is written once there is room again.
    A process that is killed loses the lines of its last GATHER_SECONDS.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._some, self._idle, self._hurry = threading.Event(), threading.Event(), threading.Event()
        # Mutable state: the lines that wait, their bytes, and how many were dropped.
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        self._idle.set()
        threading.Thread(target=self._run, name="log", daemon=True).start()

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
                    note = b'{"component":"log","event":"lines_dropped","level":"warning","lines":%d}\n' % self._dropped
                    self._dropped = 0
                    self._lines.append(note)
                    self._bytes += len(note)

    def _write(self, batch: bytes) -> None:
        rest = memoryview(batch)
        with suppress(OSError):  # a closed pipe has no reader
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


class LogHandler(logging.Handler):
    """Passes the standard library's records to a LogWriter, which the standard library flushes at exit."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer
        self.flush = writer.flush  # type: ignore[method-assign]

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            self._writer.write(self.format(record).encode() + b"\n")
        except Exception:  # noqa: BLE001  as the standard library's own handlers do
            self.handleError(record)


class _Logger:
    """Passes structlog's finished lines to a LogWriter."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer

    def msg(self, message: bytes) -> None:
        """Write a line."""
        self._writer.write(message + b"\n")

    log = debug = info = warning = warn = error = critical = exception = fatal = failure = err = msg


def _with_worker(worker: int, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event["worker"] = worker
    return event


def _json(_: WrappedLogger, __: str, event: EventDict) -> bytes:
    return orjson.dumps(event, default=str)


def _encoded(_: WrappedLogger, __: str, event: EventDict | str) -> bytes:
    return str(event).encode()


def _decoded(_: WrappedLogger, __: str, event: EventDict | bytes) -> str:
    return event.decode() if isinstance(event, bytes) else str(event)
