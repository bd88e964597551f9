"""`pvt-serve ls`, `pvt-serve verify` and `pvt-serve rm`."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cli import options
from cli.stores import StoreOption, store_folder
from cli.terminal import FAILED, print_line, tell
from service.acquisition.catalogue import CATALOGUE
from service.acquisition.removal import removable, remove
from service.store.store import Store
from service.store.stored import StoredModel

_WIDE = 250  # characters, where nobody has to look at it


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (ls, verify, rm):
        app.command(rich_help_panel="Models")(command)


@dataclass(frozen=True, slots=True)
class _Row:
    """A version, or published weights that are not in the store."""

    model: str
    version: str
    state: str
    classes: int | None = None
    input_size: tuple[int, int] | None = None
    parameters: int | None = None
    bytes: int | None = None
    top1: float | None = None
    source: str = ""
    aliases: tuple[str, ...] = ()
    reason: str = ""


def ls(
    store: StoreOption = None,
    every: Annotated[bool, typer.Option("--all", help="Also the public models that 'pvt-serve pull' fetches.")] = False,
    as_json: options.Json = False,
) -> None:
    """List what is in the model store: every version of every model.

    What has state `failed` can't be loaded; the reason is given. `pvt-serve verify` looks into the weights, too.
    """
    contents = Store(store_folder(store)).contents()
    rows = [
        _row(each, (*contents.aliases_of(each.key), *(contents.aliases_of(each.id) if i == 0 else ())))
        for versions in contents.versions.values()
        for i, each in enumerate(versions)
    ]
    if every:
        rows += [
            _Row(row.id, "", "remote", 1000, (224, 224), row.parameters, None, row.top1, row.files["timm"].urls[0])
            for row in CATALOGUE.values()
            if row.id not in contents.versions
        ]
    if as_json:
        print_line(json.dumps({"models": [asdict(row) for row in rows]}, indent=2))
    else:
        _print_table(rows)


def verify(store: StoreOption = None, as_json: options.Json = False) -> None:
    """Check every model of the store: digest, tensors, finite weights, and its reference outputs computed anew.

    Exits with 1 if anything is not as it should be.
    """
    bad, verdicts = 0, []
    from service.acquisition.verification import verify as verify_store  # noqa: PLC0415  with it comes torch, which --help does not need

    for verdict in verify_store(store_folder(store)):
        bad += verdict.failure is not None
        verdicts.append(asdict(verdict))
        if not as_json:
            print_line(
                f"{'BAD' if verdict.failure else 'ok':3}  {verdict.name}  {verdict.failure or verdict.note}".rstrip()
            )
    if as_json:
        print_line(json.dumps({"verdicts": verdicts}, indent=2))
    if bad:
        tell(f"pvt-serve: {bad} of {len(verdicts)} are not as they should be")
        raise typer.Exit(FAILED)


def rm(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="VARIANT.TAG for all its versions, VARIANT.TAG@VERSION for one.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: StoreOption = None,
) -> None:
    """Remove a model from the store, or one version of it.

    What an alias stands for is not removed.
    """
    root = store_folder(store)
    found = removable(root, model)
    names = ", ".join(each.key if each.version else each.id for each in found)
    if not yes:
        typer.confirm(f"Remove {names} from {root}?", abort=True, err=True)
    remove(root, found)
    print_line(f"removed {names}")


def _row(stored: StoredModel, aliases: tuple[str, ...]) -> _Row:
    card = stored.card
    if card is None:
        return _Row(stored.id, stored.version, "failed", aliases=aliases, reason=str(stored.failure))
    return _Row(
        model=stored.id,
        version=stored.version,
        state="available",
        classes=len(card.labels),
        input_size=(card.preprocessing.height, card.preprocessing.width),
        parameters=card.parameters,
        bytes=card.weights.bytes,
        top1=card.accuracy.top1 if card.accuracy else None,
        source=card.source,
        aliases=aliases,
    )


def _print_table(rows: list[_Row]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "version", "state", "classes", "input", "parameters", "MB", "top-1", "aliases", "from"):
        table.add_column(name, justify="right" if name in {"classes", "parameters", "MB", "top-1"} else "left")
    for row in rows:
        table.add_row(
            row.model,
            row.version,
            row.state,
            _shown(row.classes),
            "x".join(map(str, row.input_size or ())),
            _shown(row.parameters),
            "" if row.bytes is None else f"{row.bytes / 1e6:.1f}",
            "" if row.top1 is None else f"{row.top1:.1%}",
            ", ".join(row.aliases),
            row.reason or row.source,
        )
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def _shown(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
