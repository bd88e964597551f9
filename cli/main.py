"""The command line, put together."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from cli import (
    aliases,
    benching,
    embedding,
    explaining,
    importing,
    listing,
    predicting,
    pulling,
    remote,
    serving,
    store,
)
from cli.terminal import print_line, short_errors

HELP = """Pyramid Vision Transformer v2 image models: serve them over HTTP, or use them from here.

Settings are the environment variables PVT_* of docs/settings.md; every command obeys them.
"""


def create_app() -> typer.Typer:
    """The command line with every command."""
    app = typer.Typer(
        name="pvt-serve", help=HELP, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False
    )
    app.callback()(_options)
    for module in (
        predicting,
        embedding,
        explaining,
        listing,
        pulling,
        importing,
        store,
        aliases,
        remote,
        serving,
        benching,
    ):
        module.register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments`, or those of the process, name; exits 2 on a usage error, 1 on any other."""
    with short_errors():
        create_app()(arguments, prog_name="pvt-serve")


def _version(asked: bool) -> None:
    if asked:
        print_line(f"pvt-serve {version('pvt-serve')}")
        raise typer.Exit


def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
