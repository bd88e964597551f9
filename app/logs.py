"""Logs: one line an event, JSON for machines or text for people, from us and from uvicorn alike."""

import logging
import sys
from functools import partial
from typing import Literal

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from app.lines import LineHandler, LineLogger, LineWriter


def configure(log_format: Literal["json", "console"], worker: int | None = None) -> None:
    """Send every log line of the process to standard error in `log_format`, with the number of the `worker`, if any.

    Our own lines, one a request, go there straight; those of libraries come through the standard library's logging.
    """
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([] if worker is None else [partial(_with_worker, worker)]),
    ]
    if log_format == "json":
        # Without the frames' variables: keys and pictures are among them.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        last: list[Processor] = [structlog.processors.ExceptionRenderer(tracebacks), _json]
    else:
        last = [
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
            _encoded,
        ]
    writer = LineWriter(sys.stderr.fileno())
    structlog.configure(
        processors=[*shared, *last],
        logger_factory=lambda *_: LineLogger(writer),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    handler = LineHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last, _decoded],
        )
    )
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change of a folder
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def _with_worker(worker: int, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event["worker"] = worker
    return event


def _json(_: WrappedLogger, __: str, event: EventDict) -> bytes:
    return orjson.dumps(event, default=str)


def _encoded(_: WrappedLogger, __: str, event: EventDict | str) -> bytes:
    return str(event).encode()


def _decoded(_: WrappedLogger, __: str, event: EventDict | bytes) -> str:
    return event.decode() if isinstance(event, bytes) else str(event)
