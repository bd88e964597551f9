"""Logs: one line an event, JSON for machines or text for people, from us and from uvicorn alike."""

import logging
from typing import Literal

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


def configure(log_format: Literal["json", "console"]) -> None:
    """Send every log line of the process to standard error in `log_format`."""
    shared: list[Processor] = [
        _without_color_message,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        last: list[Processor] = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(_dumps)]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _without_color_message(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Uvicorn says some things twice, the second time with terminal colours."""
    event.pop("color_message", None)
    return event


def _dumps(event: EventDict, **_: object) -> str:
    return orjson.dumps(event, default=str).decode()
