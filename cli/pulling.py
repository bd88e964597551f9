"""`pvt-serve pull`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cli import options
from cli.terminal import FAILED, SOME_FAILED, USAGE, CommandError, logs_on_stderr, print_line, print_note, reason
from service.acquisition.catalogue import CATALOGUE, DEFAULT_SOURCE, Published, SourceName, published
from service.errors import ServiceError

if TYPE_CHECKING:
    from service.acquisition.pulling import Pulled, PullOptions


def pull(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODELS...", help=f"Variants: {', '.join(CATALOGUE)}; b0, b1, ... for short."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Pull all seven, about 1 GB.")] = False,
    source: Annotated[SourceName, typer.Option(help="Whose copy of the public weights to fetch.")] = DEFAULT_SOURCE,
    store: options.Store = None,
    mirror: Annotated[
        str | None,
        typer.Option(metavar="URL", help="In place of https://huggingface.co and https://github.com; PVT_MIRROR."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Fetch as a new version what is there already.")] = False,
) -> None:
    """Fetch public ImageNet-1k weights into the model store.

    Each file is checked against its SHA-256, converted, and written as `<variant>.in1k` with labels, licence and
    reference outputs. A pull that was broken off goes on where it ended; what is in the store already is not fetched
    again. Then `pvt-serve predict --model pvt_v2_b2 ...`.
    """
    if every == bool(models):
        raise CommandError("name the models to pull, such as 'pvt-serve pull b2', or give --all", USAGE)
    requested = list(CATALOGUE.values()) if every else [published(name) for name in models or ()]
    from service.acquisition.pulling import PullOptions  # noqa: PLC0415  imports torch, which --help does not need

    pull_options = PullOptions(source=source, mirror=mirror or options.read_settings().mirror or None)
    root, failed = options.store_folder(store, write=True), 0
    with logs_on_stderr():
        for model in dict.fromkeys(each.variant for each in requested):
            try:
                print_line(_described(_pulled(root, CATALOGUE[model], pull_options, again=again), pull_options))
            except ServiceError as error:
                if len(requested) == 1:
                    raise
                failed += 1
                print_note(f"pvt-serve: {model}: {reason(error)}")
    if failed:
        raise typer.Exit(FAILED if failed == len(requested) else SOME_FAILED)


def _pulled(root: Path, model: Published, options: "PullOptions", *, again: bool) -> "Pulled":
    from service.acquisition.pulling import pull as pull_model  # noqa: PLC0415  imports torch, which --help does not need

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task(model.id, total=None)
        return pull_model(
            root,
            model,
            options,
            again=again,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )


def _described(pulled: "Pulled", options: "PullOptions") -> str:
    key, card = pulled.stored.key, pulled.stored.require_card()
    if not pulled.fresh:
        return f"{key} is in the store already; --again fetches it as a new version"
    origin = card.origin
    if origin is None:
        return key
    size = f"{origin.bytes / 1e6:.1f} MB from {options.source}"
    checks = {
        "publisher": "SHA-256 as its publisher gave it",
        "hub": "SHA-256 as the hub gives it",
        "nobody": f"SHA-256 {origin.sha256}, which nobody has published: the first file fetched is trusted",
    }
    return f"{key}: {size}, {checks[origin.digest_from]}"
