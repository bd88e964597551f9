"""What the command line says: results on standard output, everything else on standard error, errors in one line."""

import asyncio
import os
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

import typer

from pvt_client import PvtError
from service.errors import ServiceError

T = TypeVar("T")

FAILED, USAGE, SOME_BAD = 1, 2, 3
"""Exit codes beside 0: nothing was done, the command was used wrongly, done but for what is listed."""


class CommandError(Exception):
    """Why a command can't do what was asked, in one line; `exit_code` is what the process ends with."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(work: Coroutine[None, None, T]) -> T:
    """The result of `work`, on an event loop of its own."""
    return asyncio.run(work)


def reason(error: Exception) -> str:
    """What `error` says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def print_line(text: str) -> None:
    """A line of the result, on standard output."""
    typer.echo(_printable(text))


def tell(text: str) -> None:
    """A line about how it goes, on standard error."""
    typer.echo(_printable(text), err=True)


def _printable(text: str) -> str:
    """File names need not be UTF-8; what is not is shown escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def short_errors() -> Iterator[None]:
    """Ends the process with one line instead of a traceback for each error that was foreseen."""
    try:
        yield
    except CommandError as error:
        tell(f"pvt-serve: {error}")
        sys.exit(error.exit_code)
    except (PvtError, ServiceError) as error:
        tell(f"pvt-serve: {reason(error)}")
        sys.exit(FAILED)
    except BrokenPipeError:  # `pvt-serve ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename else reason(error)
        tell(f"pvt-serve: {told}")
        sys.exit(FAILED)
    except KeyboardInterrupt:
        tell("pvt-serve: interrupted")
        sys.exit(130)
