"""Aliases: other names of models, in `aliases.json` at the store's root.

{"production": "pvt_v2_b2.mine@2", "canary": "pvt_v2_b2.mine"}

Read afresh each time. Written by one process at a time, and by renaming, so that a reader sees the old file or the new.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout
from pydantic import RootModel, ValidationError

from service.errors import AliasesInvalid, InvalidRequest, ModelNotFound, StoreNotWritable
from service.invalid import reasons
from service.store.names import ALIASES_FILE, ModelName, alias_name, alias_target

MAX_BYTES = 1_000_000
LOCK_SECONDS = 10.0
_LOCK_FILE = ".aliases.lock"
_NONE: Mapping[str, ModelName] = MappingProxyType({})

Aliases = Mapping[str, ModelName]


class _File(RootModel[dict[str, str]]):
    """The file's form."""


def read_aliases(root: Path) -> Aliases:
    """Every alias of the store at `root`, and what it stands for, which need not exist.

    Raises:
        AliasesInvalid: the file can't be read, or is not of its form; the message says what is wrong with it.
    """
    path = root / ALIASES_FILE
    try:
        if path.exists() and not path.is_file():
            raise AliasesInvalid(f"{path}: no regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise AliasesInvalid(f"{path}: larger than {MAX_BYTES} bytes, which no list of aliases is")
        entries = _File.model_validate_json(data).root
        return {alias_name(name): alias_target(target) for name, target in sorted(entries.items())}
    except FileNotFoundError as error:
        if path.is_symlink():
            raise AliasesInvalid(f"{path}: a link to what is not there") from error
        return _NONE
    except OSError as error:
        raise AliasesInvalid(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise AliasesInvalid(f'{path}: it must be an object {{"alias": "model"}}; {reasons(error)}') from error
    except InvalidRequest as error:
        raise AliasesInvalid(f"{path}: {error}") from error


def write_alias(root: Path, name: str, target: str) -> None:
    """Let `name` stand for `target` from now on; whether that exists is for the caller to know.

    Raises:
        InvalidRequest: one of the two is not of its form.
        AliasesInvalid: the file there is broken, and is left as it is.
        StoreNotWritable: the file can't be written.
    """
    new = {alias_name(name): alias_target(target)}
    _change(root, lambda aliases: {**aliases, **new})


def delete_alias(root: Path, name: str) -> None:
    """Let `name` stand for nothing.

    Raises:
        ModelNotFound: there is no such alias.
        AliasesInvalid, StoreNotWritable: as `write_alias`.
    """

    def without(aliases: Aliases) -> Aliases:
        if name not in aliases:
            there = ", ".join(map(repr, aliases)) or "none"
            raise ModelNotFound(f"no alias {name!r}; there are: {there}")
        return {other: target for other, target in aliases.items() if other != name}

    _change(root, without)


def _change(root: Path, change: Callable[[Aliases], Aliases]) -> None:
    lock = FileLock(root / _LOCK_FILE, timeout=LOCK_SECONDS)
    try:
        with lock:
            _write(root, change(read_aliases(root)))
    except Timeout as error:
        raise StoreNotWritable(
            f"{lock.lock_file} has been held by another process for {LOCK_SECONDS:.0f} s; try again"
        ) from error
    except OSError as error:
        raise StoreNotWritable(
            f"the model store {str(root)!r} can't be written ({error.strerror or error}) and its aliases are as they "
            "were; change them where the store is writable"
        ) from error


def _write(root: Path, aliases: Aliases) -> None:
    """Under the lock, so one name for what is not whole yet is enough, and a killed process leaves one file at most."""
    path, staged = root / ALIASES_FILE, root / f".{ALIASES_FILE}.new"
    text = json.dumps({name: str(aliases[name]) for name in sorted(aliases)}, indent=2) + "\n"
    try:
        with staged.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    folder = os.open(root, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name's change, too, outlives a power cut
    finally:
        os.close(folder)
