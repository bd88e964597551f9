"""The terminal: results on standard output, everything else on standard error, errors in one line."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import structlog
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from pvt_client import PvtError
from service.errors import ServiceError

FAILED, USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes beside 0: nothing was done, the command was used wrongly, done but for the failures that are listed, and
Ctrl-C."""
_WIDE = 250  # characters of a table that is not written to a terminal
_NUMBERS = {"classes", "parameters", "MB", "top-1"}  # columns that are aligned to the right


class CommandError(Exception):
    """Why a command fails, in one line; `exit_code` is that of the process."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reason(error: Exception) -> str:
    """The message of `error`, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def print_line(text: str) -> None:
    """A line of the result, on standard output."""
    typer.echo(_printable(text))


def print_note(text: str) -> None:
    """A line beside the result, on standard error."""
    typer.echo(_printable(text), err=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """`rows` below the names of `columns`, on standard output."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def thousands(number: int | None) -> str:
    """`number` with separators; nothing for None."""
    return "" if number is None else f"{number:,}"


def _printable(text: str) -> str:
    """File names need not be UTF-8; other bytes are shown escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def logs_on_stderr(level: int = logging.WARNING) -> Iterator[None]:
    """While the block runs, the service logs to standard error, from `level` on."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        yield
    finally:
        structlog.configure(**before)


@contextmanager
def short_errors() -> Iterator[None]:
    """Ends the process with one line, and no traceback, for each expected error."""
    try:
        yield
    except CommandError as error:
        message, code = str(error), error.exit_code
    except (PvtError, ServiceError) as error:
        message, code = reason(error), FAILED
    except BrokenPipeError:  # `pvt-serve ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except OSError as error:
        message, code = f"{error.filename}: {error.strerror}" if error.filename else reason(error), FAILED
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
    else:
        return
    print_note(f"pvt-serve: {message}")
    sys.exit(code)
