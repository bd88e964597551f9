"""The commands of the model store: `pvt-serve models`, `ls`, `verify`, `rm`, `alias` and `index`."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Exit, Option

from app.settings import Settings
from cli import options
from cli.options import connect, store_folder
from cli.terminal import FAILED, USAGE, CommandError, print_line, print_note, print_table, thousands
from service.acquisition.catalogue import CATALOGUE
from service.errors import ModelNotFound
from service.store.folder import removable, remove
from service.store.location import write_index
from service.store.remote import open_store
from service.store.store import INDEX_FILE, Store, StoredModel

_MODEL_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "model": lambda model: model["id"] + (" (default)" if model["default"] else ""),
    "version": lambda model: model["version"],
    "state": lambda model: model["state"],
    "classes": lambda model: thousands(model.get("num_classes")),
    "input": lambda model: "x".join(map(str, model.get("input_size", ()))),
    "parameters": lambda model: thousands(model.get("parameters")),
    "runs on": lambda model: " ".join(filter(None, (model.get("backend"), model.get("precision")))),
    "reason": lambda model: model.get("reason", ""),
}


def models(as_json: options.Json = False, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """List the models of the store, or of a service.

    Only a service can say which models are in memory and how they run: give --url. The table leaves out models that
    could be pulled; `pvt-serve ls --all` has them.
    """

    async def details() -> list[Mapping[str, Any]]:
        async with connect(url, api_key) as inference:
            return [model.details for model in await inference.models()]

    found = asyncio.run(details())
    if as_json:
        print_line(json.dumps({"models": found}, indent=2))
    else:
        print_table(_MODEL_COLUMNS, [model for model in found if model["state"] != "remote"], hide_empty=True)


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


_VERSION_COLUMNS: Mapping[str, Callable[[_Row], str]] = {
    "model": lambda row: row.model,
    "version": lambda row: row.version,
    "state": lambda row: row.state,
    "classes": lambda row: thousands(row.classes),
    "input": lambda row: "x".join(map(str, row.input_size or ())),
    "parameters": lambda row: thousands(row.parameters),
    "MB": lambda row: "" if row.bytes is None else f"{row.bytes / 1e6:.1f}",
    "top-1": lambda row: "" if row.top1 is None else f"{row.top1:.1%}",
    "aliases": lambda row: ", ".join(row.aliases),
    "from": lambda row: row.reason or row.source,
}


def ls(
    store: options.Store = None,
    every: Annotated[bool, Option("--all", help="Also the public models that 'pvt-serve pull' fetches.")] = False,
    as_json: options.Json = False,
) -> None:
    """List what is in the model store: every version of every model.

    A version with the state `failed` can't be loaded; the reason is given. `pvt-serve verify` checks the weights, too.
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
        print_table(_VERSION_COLUMNS, rows)


def _row(stored: StoredModel, aliases: tuple[str, ...]) -> _Row:
    card = stored.card
    if card is None:
        return _Row(stored.id, stored.version, "failed", aliases=aliases, reason=str(stored.failure))
    size = card.preprocessing.height, card.preprocessing.width
    top1 = card.accuracy.top1 if card.accuracy else None
    numbers = (len(card.labels), size, card.parameters, card.weights.bytes, top1)
    return _Row(stored.id, stored.version, "available", *numbers, source=card.source, aliases=aliases)


def verify(store: options.Store = None, as_json: options.Json = False) -> None:
    """Check every model of the store: digest, tensors, finite weights, and that it gives its reference logits.

    Exits with 1 if anything is wrong.
    """
    from service.acquisition.publishing import verify as verify_store  # noqa: PLC0415  imports torch, which --help does not need

    verdicts = []
    for verdict in verify_store(store_folder(store)):
        verdicts.append(verdict)
        if not as_json:
            state = "BAD" if verdict.failure else "ok"
            print_line(f"{state:3}  {verdict.name}  {verdict.failure or verdict.note}".rstrip())
    if as_json:
        print_line(json.dumps({"verdicts": [asdict(verdict) for verdict in verdicts]}, indent=2))
    if bad := sum(verdict.failure is not None for verdict in verdicts):
        print_note(f"pvt-serve: {bad} of {len(verdicts)} are not as they should be")
        raise Exit(FAILED)


def rm(
    model: Annotated[
        str, Argument(metavar="MODEL", help="VARIANT.TAG for all its versions, VARIANT.TAG@VERSION for one.")
    ],
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    store: options.Store = None,
) -> None:
    """Remove a model from the store, or one version of it.

    A model that an alias stands for is not removed.
    """
    root = store_folder(store)
    found = removable(root, model)
    names = ", ".join(each.key if each.version else each.id for each in found)
    if not yes:
        typer.confirm(f"Remove {names} from {root}?", abort=True, err=True)
    remove(root, found)
    print_line(f"removed {names}")


def alias(
    name: Annotated[str | None, Argument(metavar="NAME", help="The alias, such as production.")] = None,
    target: Annotated[str | None, Argument(metavar="TARGET", help="VARIANT.TAG or VARIANT.TAG@VERSION.")] = None,
    *,
    remove: Annotated[bool, Option("--rm", help="Remove the alias NAME.")] = False,
    as_json: Annotated[bool, Option("--json", help="Write all aliases as JSON, after the change.")] = False,
) -> None:
    """Show the aliases of the model store, or let NAME stand for TARGET.

    An alias of a model without a version stands for its newest good version. A service that uses the alias loads the
    new model beside the old one, and switches when it is ready.
    """
    if remove and (name is None or target is not None):
        raise CommandError("--rm takes a NAME and no TARGET", USAGE)
    settings = Settings.from_environment()
    changes = remove or target is not None
    folder = store_folder(None, write=True) if changes and not settings.remote_store else settings.store_folder
    store = open_store(folder, settings.remote_store)
    before = store.aliases()
    if name is not None and target is not None:
        store.set_alias(name, target)
        message = f"{name} -> {target}" + (f" (was {before[name]})" if name in before else "")
    elif remove and name is not None:
        store.remove_alias(name)
        message = f"{name} is removed (was {before[name]})"
    elif name is not None and name not in before:
        raise ModelNotFound(f"no alias {name!r}; 'pvt-serve alias' lists the aliases")
    else:
        message = before[name] if name is not None else _alias_lines(store)
    print_line(json.dumps(dict(store.aliases()), indent=2) if as_json else message)


def _alias_lines(store: Store) -> str:
    """A line for each alias, with the reason where it stands for nothing that can be loaded."""
    rows = []
    for name, target in store.aliases().items():
        try:
            found = store.find(name)
            note = f"({found.key})" if found.key != target else ""
            note = f"failed: {found.failure}" if found.failure else note
        except ModelNotFound as error:
            note = str(error)
        rows.append((name, target, note))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines = (f"{name:{widths[0]}}  {target:{widths[1]}}  {note}".rstrip() for name, target, note in rows)
    return "\n".join(lines) or "no aliases"


def index(
    folder: Annotated[
        Path | None, Argument(metavar="FOLDER", help="The store to list.  [PVT_MODEL_STORE]", show_default=False)
    ] = None,
) -> None:
    """Write index.json into a model store, for web servers that do not list their folders.

    Write it anew after each change of the store, before or after copying the store to the web server.
    """
    if folder is None and Settings.from_environment().remote_store:
        raise CommandError("PVT_MODEL_STORE is a URL; name the FOLDER that is served there", USAGE)
    root = folder or store_folder(None)
    try:
        written = write_index(root)
    except OSError as error:
        raise CommandError(f"{root / INDEX_FILE} can't be written: {error.strerror or error}") from error
    total = sum(file.bytes for file in written.files)
    print_line(f"{root / INDEX_FILE}: {len(written.files)} files, {total / 1e6:.1f} MB")
