"""`pvt-serve index`."""

from pathlib import Path
from typing import Annotated

import typer

from app.start import StartRefused, read_settings
from cli.terminal import USAGE, CommandError, print_line
from service.errors import WeightsUnavailable
from service.store.index import write_index
from service.store.names import INDEX_FILE


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Models")(index)


def index(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The store to list.  [PVT_MODEL_STORE]", show_default=False)
    ] = None,
) -> None:
    """Write index.json into a model store, for web servers that do not list their folders.

    Do so again after each change, before or after copying the store to where it is served.
    """
    root = folder or _folder()
    try:
        written = write_index(root)
    except WeightsUnavailable as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{root / INDEX_FILE} can't be written: {error.strerror or error}") from error
    total = sum(file.bytes for file in written.files)
    print_line(f"{root / INDEX_FILE}: {len(written.files)} files, {total / 1e6:.1f} MB")


def _folder() -> Path:
    try:
        settings = read_settings()
    except StartRefused as error:
        raise CommandError(str(error), USAGE) from error
    if settings.remote_store:
        raise CommandError("PVT_MODEL_STORE is a URL; name the FOLDER that is served there", USAGE)
    return settings.store_folder
