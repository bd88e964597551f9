"""The terminal: results on standard output, everything else on standard error, errors in one line."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import structlog
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TimeRemainingColumn
from rich.table import Table

from app.settings import SettingsInvalid
from pvt_client import PvtError
from service.errors import ServiceError

T = TypeVar("T")
FAILED, USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes beside 0: nothing was done, the command was used wrongly, done but for the failures that are listed, and
Ctrl-C."""
_WIDE = 250  # characters of a table that is not written to a terminal
_NUMBERS = {
    "classes",
    "parameters",
    "MB",
    "top-1",
    "images",
    "recall",
    "precision",
}  # columns that are aligned to the right


class CommandError(Exception):
    """Why a command fails, in one line; `exit_code` is that of the process."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reason(error: Exception) -> str:
    """The message of `error`, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def print_line(text: str, *, err: bool = False) -> None:
    """A line of the result, on standard output; file names need not be UTF-8, and other bytes are shown escaped."""
    typer.echo(text.encode("utf-8", "backslashreplace").decode(), err=err)


def print_note(text: str) -> None:
    """A line beside the result, on standard error."""
    print_line(text, err=True)


def print_table(columns: Mapping[str, Callable[[T], str]], rows: Sequence[T], *, hide_empty: bool = False) -> None:
    """On standard output, the text of each of `rows` in each of `columns`; `hide_empty`: but for empty columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown: list[Callable[[T], str]] = []
    for name, text in columns.items():
        if not hide_empty or not shown or any(map(text, rows)):
            table.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
            shown.append(text)
    for row in rows:
        table.add_row(*(text(row) for text in shown))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def progress_bar(*columns: ProgressColumn, transient: bool = False) -> Progress:
    """A bar on standard error, if that is a terminal, that ends with the time left; `transient`: gone in the end."""
    console = Console(stderr=True)
    columns = (*columns, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)


def thousands(number: int | None) -> str:
    """`number` with separators; nothing for None."""
    return "" if number is None else f"{number:,}"


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
    except SettingsInvalid as error:
        message, code = str(error), USAGE
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
