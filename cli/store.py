"""The commands that check and change the model store: `pvt-serve verify`, `rm`, `alias` and `index`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Exit, Option

from cli import completion, options
from cli.environment import settings, store_folder
from cli.terminal import FAILED, USAGE, CommandError, print_line, print_problem
from service.errors import ModelNotFound
from service.store.folder import removable, remove
from service.store.location import write_index
from service.store.remote import open_store
from service.store.store import INDEX_FILE, Store


def verify(store: options.Store = None, as_json: options.Json = False) -> None:
    """Check every model of the store: its digest, its tensors, its reference logits.

    Weights must be finite. Exits with 1 if anything is wrong.
    """
    root = store_folder(store)
    Store(root).contents()  # raises if it can't be read
    from service.acquisition.publishing import verify as verify_store  # imports torch

    verdicts = []
    for verdict in verify_store(root):
        verdicts.append(verdict)
        if not as_json:
            state = "BAD" if verdict.failure else "ok"
            print_line(f"{state:3}  {verdict.name}  {verdict.failure or verdict.note}".rstrip())
    if as_json:
        print_line(json.dumps({"verdicts": [asdict(verdict) for verdict in verdicts]}, indent=2))
    if bad := sum(verdict.failure is not None for verdict in verdicts):
        print_problem(f"pvt-serve: {bad} of {len(verdicts)} are not as they should be")
        raise Exit(FAILED)


def rm(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="VARIANT.TAG for all its versions, VARIANT.TAG@VERSION for one.",
            autocompletion=completion.models,
        ),
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
    name: Annotated[
        str | None, Argument(metavar="NAME", help="The alias, such as production.", autocompletion=completion.aliases)
    ] = None,
    target: Annotated[
        str | None,
        Argument(metavar="TARGET", help="VARIANT.TAG or VARIANT.TAG@VERSION.", autocompletion=completion.models),
    ] = None,
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
    found = settings()
    changes = remove or target is not None
    folder = store_folder(None, write=True) if changes and not found.remote_store else found.store_folder
    store = open_store(folder, found.remote_store)
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
    if folder is None and settings().remote_store:
        raise CommandError("PVT_MODEL_STORE is a URL; name the FOLDER that is served there", USAGE)
    root = folder or store_folder(None)
    try:
        written = write_index(root)
    except OSError as error:
        raise CommandError(f"{root / INDEX_FILE} can't be written: {error.strerror or error}") from error
    total = sum(file.bytes for file in written.files)
    print_line(f"{root / INDEX_FILE}: {len(written.files)} files, {total / 1e6:.1f} MB")
