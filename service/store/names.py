"""What models, their versions and their aliases are called, and the file of the aliases.

pvt_v2_b2.mine      a model, `<variant>.<tag>`: its newest good version
pvt_v2_b2.mine@2    this version of it
pvt_v2_b2           a variant alone: its published weights, or its only model
production          an alias, which has no dot, so that it is never a model's name

Aliases lie in `aliases.json` at the store's root, as {"production": "pvt_v2_b2.mine@2"}. The file is read at each call.
One process at a time changes it, by an atomic write, so a reader sees the old aliases or the new ones.
"""

import errno
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from filelock import FileLock, Timeout
from pydantic import RootModel, ValidationError

from service.architecture.variants import VARIANTS
from service.errors import AliasesInvalid, InvalidRequest, ModelNotFound, StoreNotWritable, reasons
from service.files import atomic_write
from service.store.folder import check_writable

DEFAULT_TAG = "in1k"  # the tag of the published ImageNet-1k weights
MODEL_ID = re.compile(r"(?P<variant>[a-z0-9_]+)\.(?P<tag>[A-Za-z0-9_-]+)")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
ALIASES_FILE, INDEX_FILE = "aliases.json", "index.json"  # beside the models, and with the form of their names
LOCK_SECONDS = 10.0
_LOCK_FILE = ".aliases.lock"
_MAX_BYTES = 1_000_000


class ModelName(NamedTuple):
    """A model's id, or a variant's name, and the requested version; None is the newest good one."""

    id: str
    version: str | None = None

    def __str__(self) -> str:
        return self.id if self.version is None else f"{self.id}@{self.version}"


Aliases = Mapping[str, ModelName]


def parse(name: str) -> ModelName:
    """The parts of `<id>` or `<id>@<version>`; the id is not checked.

    Raises:
        ModelNotFound: what follows the @ is no version.
    """
    id_, at, version = name.partition("@")
    if at and not VERSION.fullmatch(version):
        raise ModelNotFound(f"no model {name!r}: what follows the @ must be a version's number, such as {id_ + '@1'!r}")
    return ModelName(id_, version if at else None)


def may_be_model(path: Path) -> bool:
    """Whether it is a folder with the name of a model, or of a variant; lost+found and the like are ignored.

    True also for a folder that can't be looked at, or a broken link: reading its versions reports what is wrong.
    """
    name = path.name
    if (MODEL_ID.fullmatch(name) is None and name not in VARIANTS) or name in {ALIASES_FILE, INDEX_FILE}:
        return False
    try:
        return S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return path.is_symlink()
        return error.errno not in {errno.ENOTDIR, errno.ENAMETOOLONG}


def may_be_alias(name: str) -> bool:
    """Whether `name` could be an alias: it is not a variant's name and has not the form of a model's."""
    return ALIAS.fullmatch(name) is not None and name not in VARIANTS


def alias_name(name: str) -> str:
    """`name`, if an alias may have it.

    Raises:
        InvalidRequest: it may not.
    """
    if name in VARIANTS:
        raise InvalidRequest(f"alias {name!r}: that is a variant's name, which means a model already")
    if not ALIAS.fullmatch(name):
        raise InvalidRequest(
            f"alias {name!r}: an alias has 1 to 64 letters, digits, '-' and '_', no dot and no @, and begins with a "
            "letter or digit"
        )
    return name


def alias_target(target: str) -> ModelName:
    """What an alias may stand for: a model, or a version of one.

    Raises:
        InvalidRequest: it is neither.
    """
    id_, at, version = target.partition("@")
    if not MODEL_ID.fullmatch(id_) or (at and not VERSION.fullmatch(version)):
        raise InvalidRequest(f"alias target {target!r}: it must be <variant>.<tag>, or <variant>.<tag>@<version>")
    return ModelName(id_, version if at else None)


class _AliasesFile(RootModel[dict[str, str]]):
    pass


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
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise AliasesInvalid(f"{path}: larger than {_MAX_BYTES} bytes, which no list of aliases is")
        entries = _AliasesFile.model_validate_json(data).root
        return {alias_name(name): alias_target(target) for name, target in sorted(entries.items())}
    except FileNotFoundError as error:
        if path.is_symlink():
            raise AliasesInvalid(f"{path}: a broken link") from error
        return {}
    except OSError as error:
        raise AliasesInvalid(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise AliasesInvalid(f'{path}: it must be an object {{"alias": "model"}}; {reasons(error)}') from error
    except InvalidRequest as error:
        raise AliasesInvalid(f"{path}: {error}") from error


def write_alias(root: Path, name: str, target: str) -> None:
    """Make `name` stand for `target`; the caller checks that this exists.

    Raises:
        InvalidRequest: one of the two is not of its form.
        AliasesInvalid: the file is broken, and is left as it is.
        StoreNotWritable: the file can't be written.
    """
    new = {alias_name(name): alias_target(target)}
    _change(root, lambda aliases: {**aliases, **new})


def delete_alias(root: Path, name: str) -> None:
    """Remove the alias `name`.

    Raises:
        ModelNotFound: there is no such alias.
        AliasesInvalid, StoreNotWritable: as `write_alias`.
    """

    def without(aliases: Aliases) -> Aliases:
        if name not in aliases:
            raise ModelNotFound(f"no alias {name!r}; there are: {', '.join(map(repr, aliases)) or 'none'}")
        return {other: target for other, target in aliases.items() if other != name}

    _change(root, without)


def _change(root: Path, change: Callable[[Aliases], Aliases]) -> None:
    check_writable(root)
    lock = FileLock(root / _LOCK_FILE, timeout=LOCK_SECONDS)
    try:
        with lock:
            aliases = {name: str(target) for name, target in sorted(change(read_aliases(root)).items())}
            # The lock makes one temporary name enough, so that killed processes leave one file at most.
            temporary = root / f".{ALIASES_FILE}.new"
            text = json.dumps(aliases, indent=2) + "\n"
            atomic_write(root / ALIASES_FILE, text, temporary=temporary, durable=True)
    except Timeout as error:
        raise StoreNotWritable(
            f"{lock.lock_file} has been held by another process for {LOCK_SECONDS:.0f} s; try again"
        ) from error
    except OSError as error:
        raise StoreNotWritable(
            f"the model store {str(root)!r} can't be written ({error.strerror or error}) and its aliases are as they "
            "were; change them where the store is writable"
        ) from error
