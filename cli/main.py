"""The command line, put together."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from typer import Exit, Option

from cli.acquisition import import_, pull
from cli.images import embed, explain, predict
from cli.labelled import check, fit
from cli.server import bench, serve
from cli.store import alias, index, ls, models, rm, verify
from cli.terminal import print_line, short_errors

HELP = """Pyramid Vision Transformer v2 image models: serve them over HTTP, or use them from the command line.

Settings are the environment variables PVT_* of docs/settings.md; every command obeys them.
"""
# The panels of the help, and their commands in the order of the help.
_COMMANDS: Mapping[str, Sequence[Callable[..., None]]] = {
    "Images": (predict, embed, explain),
    "Models": (models, pull, import_, check, fit, ls, verify, rm, alias, index),
    "Server": (serve, bench),
}


def create_app() -> typer.Typer:
    """The command line with every command."""
    app = typer.Typer(
        name="pvt-serve", help=HELP, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False
    )
    app.callback()(_options)
    for panel, commands in _COMMANDS.items():
        for command in commands:
            app.command(command.__name__.rstrip("_"), rich_help_panel=panel)(command)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments`, or those of the process, name; exits 2 on a usage error, 1 on any other."""
    with short_errors():
        create_app()(arguments, prog_name="pvt-serve")


def _version(requested: bool) -> None:
    if requested:
        print_line(f"pvt-serve {version('pvt-serve')}")
        raise Exit


def _options(
    _: Annotated[
        bool, Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
