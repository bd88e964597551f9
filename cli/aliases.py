"""`pvt-serve alias`."""

import json
from typing import Annotated

import typer

from app.settings import Settings, SettingsInvalid
from service.errors import ModelNotFound
from service.store.remote import open_store
from service.store.store import Store


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Models")(alias)


def alias(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The alias, such as production.")] = None,
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="VARIANT.TAG or VARIANT.TAG@VERSION.")] = None,
    *,
    remove: Annotated[bool, typer.Option("--rm", help="Let NAME stand for nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write all aliases as JSON, after the change.")] = False,
) -> None:
    """Show the aliases of the model store, or let NAME stand for TARGET.

    A model without a version is followed: the alias stands for its newest good version. A service that uses the alias
    loads the new model beside the old one, and passes over when it is ready.
    """
    if remove and (name is None or target is not None):
        raise typer.BadParameter("--rm takes a NAME and no TARGET")
    store = _store()
    before = store.aliases()
    if name is not None and target is not None:
        store.set_alias(name, target)
        told = f"{name} -> {target}" + (f" (was {before[name]})" if name in before else "")
    elif remove and name is not None:
        store.remove_alias(name)
        told = f"{name} is gone (was {before[name]})"
    elif name is not None:
        told = _one(before, name)
    else:
        told = _table(store)
    typer.echo(json.dumps(dict(store.aliases()), indent=2) if as_json else told)


def _one(aliases: dict[str, str], name: str) -> str:
    if name not in aliases:
        raise ModelNotFound(f"no alias {name!r}; 'pvt-serve alias' lists what there is")
    return aliases[name]


def _table(store: Store) -> str:
    """A line for each alias; one that stands for nothing that can be loaded says so."""
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
    return (
        "\n".join(f"{name:{widths[0]}}  {target:{widths[1]}}  {note}".rstrip() for name, target, note in rows)
        or "no aliases"
    )


def _store() -> Store:
    try:
        settings = Settings.from_environment()
    except SettingsInvalid as error:
        raise typer.BadParameter(str(error)) from error
    return open_store(settings.store_folder, settings.remote_store)
