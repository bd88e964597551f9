"""The terminal: results on standard output, everything else on standard error, errors in one line."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from traceback import print_exception
from typing import TYPE_CHECKING

import typer
from typer import Abort, Exit, TyperException

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

FAILED, USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes beside 0: it could not be done, the command was used wrongly, done but for the failures that are listed,
and Ctrl-C."""
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
QUIET, NORMAL, VERBOSE = -1, 0, 1
verbosity: ContextVar[int] = ContextVar("verbosity", default=NORMAL)
"""What -q and -v set for the command that runs."""


class CommandError(Exception):
    """Why a command fails, in one line; `exit_code` is that of the process."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reason(error: BaseException) -> str:
    """The message of `error`, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def print_line(text: str, *, err: bool = False) -> None:
    """A line of the result, on standard output.

    What its encoding does not have, as bytes of a name, is escaped, and so is what moves the cursor or changes colours.
    """
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    typer.echo(text.translate(_CONTROLS).encode(encoding, "backslashreplace").decode(encoding), err=err)


def printable(text: str) -> str:
    """`text` in one line, without characters that move the cursor or change colours: they are escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def print_problem(text: str) -> None:
    """A line about what failed, on standard error."""
    print_line(text, err=True)


def print_note(text: str) -> None:
    """A line beside the result, on standard error, but for -q."""
    if verbosity.get() > QUIET:
        print_problem(text)


def thousands(number: int | None) -> str:
    """`number` with separators; nothing for None."""
    return "" if number is None else f"{number:,}"


def progress_bar(*columns: "ProgressColumn", transient: bool = False) -> "Progress":
    """A spinner, `columns` and the time left, on standard error if that is a terminal that can; none with -q.

    `transient`: gone in the end.
    """
    from rich.progress import Progress, SpinnerColumn, TimeRemainingColumn

    console = _error_console()
    hidden = not console.is_interactive or verbosity.get() == QUIET
    columns = (SpinnerColumn(), *columns, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient, disable=hidden)


def spinner(text: str) -> AbstractContextManager[object]:
    """While the block runs, `text` and a sign of life on standard error, as `progress_bar`."""
    from contextlib import nullcontext

    console = _error_console()
    if not console.is_interactive or verbosity.get() == QUIET:
        return nullcontext()
    return console.status(text)


def output_console() -> "Console":
    """Standard output as a terminal, if it is one."""
    from rich.console import Console

    return Console()


def _error_console() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def logs_on_stderr(level: int = logging.WARNING) -> Iterator[None]:
    """While the block runs, the service logs to standard error, from `level` on; with -v from INFO on."""
    import structlog

    from app.logs import console_renderer

    level = min(level, logging.INFO) if verbosity.get() == VERBOSE else level
    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.processors.add_log_level, console_renderer(sys.stderr)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        yield
    finally:
        structlog.configure(**before)


@contextmanager
def short_errors() -> Iterator[None]:
    """Ends the process with one line, and no traceback but with -v, for each expected error."""
    try:
        yield
    except Exit as end:
        sys.exit(end.exit_code)
    except BrokenPipeError:  # `pvt-serve ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except (Exception, KeyboardInterrupt) as error:
        if (ending := _ending(error)) is None:
            raise
        message, code = ending
        if verbosity.get() == VERBOSE:
            print_exception(error)
    if message:
        print_problem(f"pvt-serve: {message}")
    sys.exit(code)


def _ending(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code of an error that is expected."""
    match error:
        case CommandError():
            found = reason(error), error.exit_code
        case TyperException():
            found = _usage(error), error.exit_code
        case Abort():
            found = "nothing was done", FAILED
        case KeyboardInterrupt():
            found = "interrupted", INTERRUPTED
        case OSError():
            found = f"{error.filename}: {error.strerror}" if error.filename else reason(error), FAILED
        case _:
            return _ending_of_work(error)
    return found


def _ending_of_work(error: BaseException) -> tuple[str, int] | None:
    """The same for errors whose classes take a third of a second to import, as they have been where one is raised."""
    import pvt_client as client
    from app.settings import SettingsInvalid
    from service.errors import InvalidRequest, ModelNotFound, ServiceError

    match error:
        case client.InvalidImage():
            return reason(error), FAILED
        case client.Unauthorized():
            return f"{reason(error)}; --key, or the variable PVT_KEY, gives a key", FAILED
        case SettingsInvalid() | InvalidRequest() | ModelNotFound():
            return reason(error), USAGE
        case client.ModelNotFound() | client.InvalidRequest() | client.InvalidUrl():
            return reason(error), USAGE
        case client.PvtError() | ServiceError():
            return reason(error), FAILED
    return None


def _usage(error: TyperException) -> str:
    """What was typed wrongly, and where the right options stand; nothing where the help was shown already."""
    message = " ".join(error.format_message().split()).rstrip(".")
    command = getattr(getattr(error, "ctx", None), "command_path", "pvt-serve")
    return f"{message}; '{command} -h' lists what there is" if message else ""
