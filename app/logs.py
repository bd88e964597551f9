"""Logs: one line an event, JSON for machines or text for people, from us and from libraries alike."""

import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from types import SimpleNamespace
from typing import Literal, TextIO
from weakref import WeakMethod

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from app.tracing import exporters
from service.store.location import hide
from service.tracing import current

Level = Literal["debug", "info", "warning", "error"]
GATHER_SECONDS = 0.02
MAX_WAITING_BYTES = 4_000_000
FLUSH_SECONDS = 2.0
_CLOCK = structlog.processors.TimeStamper("%H:%M:%S", utc=False)  # for people


def configure(
    log_format: Literal["auto", "json", "console"],
    worker: int | None = None,
    *,
    level: Level = "info",
    secrets: Sequence[str] = (),
) -> None:
    """Send log lines of the process to standard error in `log_format`, with the number of the `worker`, if any.

    Those below `level` are left out, whoever writes them.

    Lines about a request that is traced have its ids. Raises SettingsInvalid as `app.tracing.exporters` does.

    `auto` is text on a terminal, and JSON elsewhere. `secrets` are hidden wherever they stand, in the messages of
    libraries and in tracebacks too.

    Our own lines, one a request, go there directly; those of libraries come through the standard library's logging.
    """
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    time = _stamped if as_json else _CLOCK
    shared: list[Processor] = [structlog.processors.add_log_level, time]
    if exporters():
        shared.append(_trace_ids)
    if worker is not None:
        shared.append(lambda _, __, event: {**event, "worker": worker})
    last = _json_renderer() if as_json else [console_renderer(sys.stderr)]
    writer = LogWriter(sys.stderr.fileno(), secrets)
    logger = SimpleNamespace(**dict.fromkeys(("debug", "info", "warning", "error", "critical"), writer.write))
    structlog.configure(
        processors=[*shared, *last],
        logger_factory=lambda *_: logger,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    writer.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger("watchfiles").setLevel(max(logging.WARNING, least))  # it reports every change of a folder
    logging.basicConfig(handlers=[writer], level=least, force=True)


def _trace_ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Adds the ids of the request that the line is about, in the form of OpenTelemetry's log data model."""
    request = current.get()
    return {**event, **request.ids} if request and not request.ended else event


def _stamped(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """As structlog's own TimeStamper writes it, in a quarter of the time."""
    event["timestamp"] = f"{datetime.now(UTC).isoformat(timespec='microseconds')[:-6]}Z"
    return event


def _json_renderer() -> list[Processor]:
    # Without the frames' variables: keys and images are among them.
    tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [
        structlog.processors.ExceptionRenderer(tracebacks),
        lambda _, __, event: orjson.dumps(event, default=str).decode(),
    ]


def console_renderer(stream: TextIO) -> Processor:
    """Renders an event as a line of text; on a terminal in colours but for NO_COLOR; the first is a banner."""
    terminal = stream.isatty()
    plain = not terminal or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    line = structlog.dev.ConsoleRenderer(
        colors=not plain, exception_formatter=structlog.dev.plain_traceback, pad_level=False
    )

    def render(logger: WrappedLogger, name: str, event: EventDict) -> str:
        if terminal and event["event"] == "listening":
            return _banner(event)
        return line(logger, name, event)

    return render


def _banner(event: EventDict) -> str:
    """Where the service listens, and what a person opens there."""
    url = str(event.get("url", ""))
    for everywhere, here in (("//0.0.0.0", "//127.0.0.1"), ("//[::]", "//[::1]")):  # no address to open
        url = url.replace(everywhere, here)
    lines = [f"pvt-serve {version('pvt-serve')} listens on {url}"]
    if url.startswith("http"):
        lines += [f"  page  {url}/", f"  docs  {url}/docs"]
    if management := event.get("management"):
        lines.append(f"  management  {management}")
    return "\n".join([*lines, "  stop it with Ctrl-C"])


def dropped_lines() -> int:
    """How many lines of this process were dropped, because nobody read them in time."""
    return sum(each.dropped_in_all for each in logging.getLogger().handlers if isinstance(each, LogWriter))


class LogWriter(logging.Handler):
    """Takes lines from any thread without ever waiting for the file; a thread writes those of a short while at once.

    A file that takes none, such as a pipe that nobody reads, holds up neither the event loop nor the exit: what waits
    is bounded, what exceeds the bound is dropped, and the number of dropped lines is written once there is room again.
    A process that is killed loses the lines of its last GATHER_SECONDS (decision 23). The standard library's
    QueueHandler bounds lines, not bytes, and its QueueListener waits for the file without end at the exit.
    """

    def __init__(self, descriptor: int, secrets: Sequence[str] = ()) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._secrets = secrets
        self.dropped_in_all = 0
        self._begin()
        # A thread does not survive a fork: servers such as `gunicorn --preload` import the application first.
        again = WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (begin := again()) and begin())

    def _begin(self) -> None:
        """Begin to write, with nothing that waits."""
        self._changed = threading.Condition()
        # Mutable state: the lines that wait, the bytes not yet written, how many lines were dropped since the last
        # note of it and in all, and whether somebody waits for all to be written.
        self._lines: list[bytes] = []
        self._bytes = 0
        self._dropped = 0
        self._flushing = False
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            self.write(self.format(record))
        except Exception:  # noqa: BLE001  as the standard library's own handlers do
            self.handleError(record)

    def write(self, line: str) -> None:
        """Take a line, which has no newline at its end."""
        data = (hide(line, self._secrets) if self._secrets else line).encode() + b"\n"
        with self._changed:
            if self._bytes + len(data) > MAX_WAITING_BYTES:
                self._dropped += 1
                self.dropped_in_all += 1
                return
            self._lines.append(data)
            self._bytes += len(data)
            if len(self._lines) == 1:
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, or for FLUSH_SECONDS when it can't be; `logging` calls it at exit."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._bytes, FLUSH_SECONDS)
            self._flushing = False

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                self._changed.wait_for(lambda: self._flushing, GATHER_SECONDS)
                batch = b"".join(self._lines)
                self._lines.clear()
            rest = memoryview(batch)
            with suppress(OSError):  # a closed pipe has no reader
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            with self._changed:
                self._bytes -= len(batch)  # what is being written counts as waiting
                if self._dropped:
                    note = b'{"component":"log","event":"lines_dropped","level":"warning","lines":%d}\n' % self._dropped
                    self._dropped = 0
                    self._lines.append(note)
                    self._bytes += len(note)
                self._changed.notify_all()
