"""The command line, put together. A command's module is imported when the command is named: `--help` is quick."""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer import Exit, Option
from typer.core import TyperGroup
from typer.main import get_command

from cli.terminal import NORMAL, QUIET, USAGE, VERBOSE, CommandError, print_line, short_errors, verbosity

HELP = """Pyramid Vision Transformer v2 image models: serve them over HTTP, or use them from the command line.

Settings are the environment variables PVT_* of docs/settings.md; every command obeys them.
"""
# The panels of the help, and their commands in its order: the name, the module, and the first line of the command's
# help.
COMMANDS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "Images": (
        ("predict", "images", "Classify images."),
        ("embed", "images", "Write the embeddings of images into one file."),
        ("explain", "images", "Show where in an image the model sees a class."),
    ),
    "Models": (
        ("ls", "listing", "List the models of the store, or of a service, with their versions."),
        ("show", "listing", "Show what is known of a model."),
        ("pull", "acquisition", "Fetch public ImageNet-1k weights, or anybody's model from the hub."),
        ("import", "acquisition", "Put a checkpoint of your own into the model store."),
        ("check", "labelled", "Measure a model on labelled images, and try other preprocessing."),
        ("fit", "labelled", "Make a classifier of your own classes from images, without training a backbone."),
        ("verify", "store", "Check every model of the store: its digest, its tensors, its reference logits."),
        ("rm", "store", "Remove a model from the store, or one version of it."),
        ("alias", "store", "Show the aliases of the model store, or let NAME stand for TARGET."),
        ("plan", "plans", "Let replicas agree on a model's batch plan: export it, import it."),
        ("index", "store", "Write index.json into a model store, for web servers that do not list their folders."),
    ),
    "Server": (
        ("serve", "server", "Serve models over HTTP until Ctrl-C."),
        ("bench", "server", "Measure the throughput and latency of a service."),
        ("ps", "remote", "List the models that a service has in memory."),
        ("top", "top", "Show what a service does, anew each second."),
        ("load", "remote", "Load models into the memory of a service."),
        ("unload", "remote", "Free the memory that models take in a service."),
        ("pin", "remote", "Load models into a service that never evicts them."),
        ("unpin", "remote", "Let a service evict models again."),
    ),
}  # fmt: skip
_SYNONYMS: Mapping[str, str] = {"models": "ls"}
_SETTINGS: Mapping[str, Any] = {"rich_markup_mode": "markdown", "pretty_exceptions_enable": False}


class _Commands(TyperGroup):
    """Commands that are known by name and summary until one of them is to run, or to show its help."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:  # noqa: ANN401  typer's
        """See `TyperGroup.resolve_command`."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and command_named(command.name or ""), rest


def create_app() -> typer.Typer:
    """The command line with every command."""
    app = typer.Typer(
        name="pvt-serve", cls=_Commands, help=HELP, no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]}, **_SETTINGS,
    )  # fmt: skip
    app.callback()(_options)
    for panel, commands in COMMANDS.items():
        for name, _, summary in commands:
            app.command(name, help=summary, rich_help_panel=panel)(_unloaded)
    for name in _SYNONYMS:
        app.command(name, help=f"The same as `{_SYNONYMS[name]}`.", hidden=True)(_unloaded)
    return app


def command_named(name: str) -> Any:  # noqa: ANN401  typer's command
    """The command with its options, and -q and -v, which all have."""
    modules = {name: module for commands in COMMANDS.values() for name, module, _ in commands}
    own = _SYNONYMS.get(name, name)
    function = f"{own}_" if own == "import" else own
    app, common = (typer.Typer(add_completion=False, **_SETTINGS) for _ in range(2))
    app.command(name)(getattr(import_module(f"cli.{modules[own]}"), function))
    common.command()(_common)
    command = get_command(app)
    command.params.extend(get_command(common).params)
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments`, or those of the process, name; exits as docs/cli.md says."""
    verbosity.set(NORMAL)
    with short_errors():
        for name in os.environ:
            if name.startswith("PVTSERVE_"):
                raise CommandError(f"{name} is not read any more: it is PVT_URL or PVT_KEY now", USAGE)
        command = get_command(create_app())
        raise Exit(command.main(arguments, prog_name="pvt-serve", standalone_mode=False) or 0)


def _unloaded() -> None:
    pass


def _set_quiet(given: bool) -> None:
    _set(QUIET, given)


def _set_verbose(given: bool) -> None:
    _set(VERBOSE, given)


def _set(level: int, given: bool) -> None:
    if given:
        if verbosity.get() == -level:
            raise CommandError("-q and -v exclude each other", USAGE)
        verbosity.set(level)


def _version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print_line(f"pvt-serve {version('pvt-serve')}")
        raise Exit


_Quiet = Annotated[
    bool,
    Option("-q", "--quiet", help="Results and errors only.", callback=_set_quiet, is_eager=True, expose_value=False),
]
_Verbose = Annotated[
    bool,
    Option(
        "-v", "--verbose", help="Also the log, and the way to an error.", callback=_set_verbose, is_eager=True,
        expose_value=False,
    ),
]  # fmt: skip


def _common(quiet: _Quiet = False, verbose: _Verbose = False) -> None:
    pass


def _options(
    _: Annotated[
        bool, Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    quiet: _Quiet = False,
    verbose: _Verbose = False,
) -> None:
    pass
