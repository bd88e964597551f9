"""The store that commands read and write: a folder."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import structlog
import typer

from app.settings import Settings, SettingsInvalid
from cli.terminal import USAGE, CommandError

StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="DIR", help="The model store; PVT_MODEL_STORE by default.")
]


def settings() -> Settings:
    """What the environment says.

    Raises:
        CommandError: a setting is wrong.
    """
    try:
        return Settings.from_environment()
    except SettingsInvalid as error:
        raise CommandError(str(error), USAGE) from error


def store_folder(given: str | None) -> Path:
    """The folder that --store names, or else PVT_MODEL_STORE.

    Raises:
        CommandError: it is a URL.
    """
    store = given or str(settings().model_store)
    if "://" in store:
        raise CommandError(f"{store}: this command works on a store in a folder; name one with --store", USAGE)
    return Path(store)


@contextmanager
def warnings_aside() -> Iterator[None]:
    """Warnings of the service go to standard error while it lasts, beside the result."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        yield
    finally:
        structlog.configure(**before)
