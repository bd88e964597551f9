"""`pvt-serve serve`."""

import os
from typing import Annotated

import typer

from cli.terminal import CommandError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Server")(serve)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all.  [PVT_HOST]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.  [PVT_PORT]")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that share the port.  [PVT_WORKERS]")] = None,
    model_store: Annotated[str | None, typer.Option(help="Where the models lie.  [PVT_MODEL_STORE]")] = None,
    preload: Annotated[str | None, typer.Option(help="Models to load at start, a,b,c.  [PVT_PRELOAD]")] = None,
) -> None:
    """Serve models over HTTP until Ctrl-C.

    The same as `python -m app`. Every other setting is an environment variable (docs/settings.md); an option given here
    wins over its variable.
    """
    given = {"HOST": host, "PORT": port, "WORKERS": workers, "MODEL_STORE": model_store, "PRELOAD": preload}
    # Where worker processes read them, too.
    os.environ.update({f"PVT_{name}": str(value) for name, value in given.items() if value is not None})
    from app.start import StartRefused, serve  # noqa: PLC0415  takes half a second, which --help need not wait for

    try:
        code = serve()
    except StartRefused as error:
        raise CommandError(str(error), exit_code=2) from error
    raise typer.Exit(code)
