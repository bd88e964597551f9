"""The model store: a folder with models, their versions and their aliases.

<root>/aliases.json                                 {"production": "pvt_v2_b0.digits@1"}
<root>/pvt_v2_b0.digits/1/card.json
<root>/pvt_v2_b0.digits/1/model.safetensors

pvt_v2_b0.digits    a model, `<variant>.<tag>`: its newest good version
pvt_v2_b0.digits@1  this version of it
pvt_v2_b0           a variant alone: its published weights, or its only model
production          an alias, which has no dot, so that it is never a model's name
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from service.architecture.variants import VARIANTS
from service.errors import (
    AliasesInvalid,
    CardInvalid,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    StoreNotWritable,
    WeightsCorrupt,
    WeightsUnavailable,
    reasons,
)
from service.files import atomic_write, read_small
from service.names import meant
from service.store.cards import ModelCard, WithCard, read_card

DEFAULT_TAG = "in1k"  # the tag of the published ImageNet-1k weights
MODEL_ID = re.compile(r"(?P<variant>[a-z0-9_]+)\.(?P<tag>[A-Za-z0-9_-]+)")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
ALIASES_FILE, INDEX_FILE = "aliases.json", "index.json"  # beside the models, and with the form of their names
LOCK_SECONDS = 10.0
EMBEDDED_STORE = Path(__file__).parent.parent / "data" / "model_store"
"""The store that is part of the package, with the embedded model. An upgrade replaces it."""
ELSEWHERE = "write to a store where that is allowed (--store, PVT_MODEL_STORE)"
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_ALIASES = TypeAdapter(dict[str, str])
_MAX_ALIASES_BYTES = 1_000_000


def parse(name: str) -> tuple[str, str | None]:
    """The id, which is not checked, and the version of `<id>` or `<id>@<version>`; raises ModelNotFound."""
    id_, at, version = name.partition("@")
    if at and not VERSION.fullmatch(version):
        raise ModelNotFound(f"no model {name!r}: what follows the @ must be a version's number, such as {id_ + '@1'!r}")
    return id_, version or None


def is_model_name(name: str) -> bool:
    """Whether a folder with this name holds a model's versions: it is a model's id, or a variant."""
    return (MODEL_ID.fullmatch(name) is not None or name in VARIANTS) and name not in {ALIASES_FILE, INDEX_FILE}


def may_be_model(path: Path) -> bool:
    """Whether it is a folder with a model's name, or could be, as a broken link: reading it reports what is wrong."""
    if not is_model_name(path.name):
        return False
    try:
        return S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return path.is_symlink()
    except OSError as error:
        return error.errno not in {errno.ENOTDIR, errno.ENAMETOOLONG}


def alias_target(target: str) -> tuple[str, str | None]:
    """The id of the model that an alias may stand for, and its version; raises InvalidRequest if it is neither."""
    with suppress(ModelNotFound):
        id_, version = parse(target)
        if MODEL_ID.fullmatch(id_):
            return id_, version
    raise InvalidRequest(f"alias target {target!r}: it must be <variant>.<tag>, or <variant>.<tag>@<version>")


def _check_alias(name: str) -> None:
    if name in VARIANTS:
        raise InvalidRequest(f"alias {name!r}: that is a variant's name, which means a model already")
    if not _ALIAS.fullmatch(name):
        raise InvalidRequest(
            f"alias {name!r}: an alias has 1 to 64 letters, digits, '-' and '_', no dot and no @, and begins with a "
            "letter or digit"
        )


@dataclass(frozen=True, slots=True)
class StoredModel(WithCard):
    """A version of a model in the store: with its card, or with the reason why it can't be used.

    `version` is empty for a model that has none.
    """

    id: str
    version: str
    folder: Path
    card: ModelCard | None
    failure: ModelLoadFailed | None = None

    @property
    def key(self) -> str:
        """`<id>@<version>`: what names this version and no other."""
        return f"{self.id}@{self.version}"


@dataclass(frozen=True, slots=True)
class Contents:
    """A whole store at one moment: each model's versions, newest first, and the aliases or what is wrong with them."""

    versions: Mapping[str, Sequence[StoredModel]]
    aliases: Mapping[str, str]
    aliases_failure: AliasesInvalid | None = None

    def aliases_of(self, name: str) -> list[str]:
        """The aliases that stand for exactly this: a model's id, or a version's key."""
        return [alias for alias, target in self.aliases.items() if target == name]


class Store:
    """Reads a store's folders at each call, so that new models are found and nothing is cached wrongly.

    `partial` says that weights may lie elsewhere: a version without its weights file is then no failure.
    Every method that reads raises WeightsUnavailable if the store's folder can't be read.
    """

    def __init__(self, root: Path, *, partial: bool = False) -> None:
        self.root = root.absolute()
        self._partial = partial

    def models(self) -> list[StoredModel]:
        """Every model of the store by name, in the newest version that is not broken, or else the newest."""
        return [_usable(versions)[0] for versions in self.contents().versions.values()]

    def contents(self) -> Contents:
        """Everything in the store."""
        self._refresh()
        versions = {folder.name: self._read(folder) for folder in self._folders()}
        try:
            return Contents(versions, self.aliases())
        except AliasesInvalid as failure:
            return Contents(versions, {}, failure)

    def versions(self, id_: str) -> list[StoredModel]:
        """Every version of a model, newest first, broken ones too; raises ModelNotFound, or WeightsUnavailable."""
        self._refresh()
        folder = self.root / id_
        if not may_be_model(folder):
            raise self._missing(id_)
        found = self._read(folder)
        if not found[0].version:
            self._folders()  # raises if the whole store can't be read, not this model alone
        return found

    def find(self, name: str) -> StoredModel:
        """The best of the `candidates`."""
        return self.candidates(name)[0]

    def candidates(self, name: str) -> list[StoredModel]:
        """The versions that `name` may stand for: the one it names, or all that are not broken, newest first.

        Where all are broken, it is the newest, with its failure. A variant alone means its ImageNet-1k weights, or the
        one model of that variant.

        Raises:
            ModelNotFound: no such model or version, or several that a bare variant could mean.
            WeightsUnavailable: a published model whose weights are not in the store.
            AliasesInvalid: it could be an alias, and the aliases can't be read.
        """
        self._refresh()
        id_, version = self._resolved(name)
        versions = self.versions(id_)
        if version is None:
            return _usable(versions)
        if named := [model for model in versions if model.version == version]:
            return named
        present = ", ".join(model.version for model in versions if model.version) or "none"
        raise ModelNotFound(f"{id_!r} has no version {version!r}; there are: {present}")

    def aliases(self) -> dict[str, str]:
        """Every alias, and the model or version that it stands for, which need not exist; raises AliasesInvalid."""
        self._refresh()
        path = self.root / ALIASES_FILE
        try:
            aliases = _ALIASES.validate_json(read_small(path, _MAX_ALIASES_BYTES, "list of aliases"))
            for name, target in aliases.items():
                _check_alias(name)
                alias_target(target)
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
        return dict(sorted(aliases.items()))

    def set_alias(self, name: str, target: str) -> None:
        """Make `name` stand for `target`, `<id>` or `<id>@<version>`, for everyone who uses this store.

        Raises:
            InvalidRequest: one of the two is not of its form.
            ModelNotFound, WeightsUnavailable, ModelLoadFailed: `target` is not in the store, or broken.
            AliasesInvalid, StoreNotWritable: the aliases can't be changed.
        """
        _check_alias(name)
        alias_target(target)
        self.find(target).require_card()
        with self._changing_aliases() as aliases:
            aliases[name] = target

    def remove_alias(self, name: str) -> None:
        """Remove an alias; raises ModelNotFound if there is none, AliasesInvalid or StoreNotWritable as `set_alias`."""
        with self._changing_aliases() as aliases:
            if name not in aliases:
                raise ModelNotFound(f"no alias {name!r}; there are: {', '.join(map(repr, aliases)) or 'none'}")
            del aliases[name]

    @contextmanager
    def _changing_aliases(self) -> Iterator[dict[str, str]]:
        """The aliases, which are written as the block leaves them, by one process at a time."""
        check_writable(self.root)
        lock = FileLock(self.root / ".aliases.lock", timeout=LOCK_SECONDS)
        try:
            with lock:
                yield (aliases := self.aliases())
                text = json.dumps(aliases, indent=2, sort_keys=True) + "\n"
                # The lock makes one temporary name enough, so that killed processes leave one file at most.
                temporary = self.root / f".{ALIASES_FILE}.new"
                atomic_write(self.root / ALIASES_FILE, text, temporary=temporary, durable=True)
        except Timeout as error:
            raise StoreNotWritable(
                f"{lock.lock_file} has been held by another process for {LOCK_SECONDS:.0f} s; try again"
            ) from error
        except OSError as error:
            raise StoreNotWritable(
                f"the model store {str(self.root)!r} can't be written ({error.strerror or error}) and its aliases are "
                "as they were; change them where the store is writable"
            ) from error

    @contextmanager
    def holding(self, stored: StoredModel) -> Iterator[StoredModel]:
        """All files of `stored` are local for as long as the context lasts; in a local store they always are."""
        yield stored

    def close(self) -> None:
        """Stop what is under way."""

    def _refresh(self) -> None:
        """Bring the folder up to date before it is read; a local store always is."""

    def _folders(self) -> list[Path]:
        try:
            return sorted(path for path in self.root.iterdir() if may_be_model(path))
        except OSError as error:
            raise WeightsUnavailable(
                f"the model store {str(self.root)!r} can't be read ({error.strerror}); PVT_MODEL_STORE names its folder"
            ) from error

    def _read(self, folder: Path) -> list[StoredModel]:
        """Every version of the model in `folder`, newest first; at least one, which has a failure if there is none."""
        try:
            numbers = sorted(
                (int(path.name) for path in folder.iterdir() if VERSION.fullmatch(path.name)), reverse=True
            )
            why = "no version folder (1, 2, ...) in it"
        except OSError as error:
            numbers, why = [], error.strerror or str(error)
        if not numbers:
            return [StoredModel(folder.name, "", folder, None, CardInvalid(f"{folder}: {why}"))]
        return [self._read_version(folder.name, folder / str(number)) for number in numbers]

    def _read_version(self, id_: str, folder: Path) -> StoredModel:
        try:
            card = read_card(folder)
            _check_name(id_, folder, card)
            self._check_weights(folder / card.weights.file, card.weights.bytes)
        except ModelLoadFailed as failure:
            return StoredModel(id_, folder.name, folder, None, failure)
        return StoredModel(id_, folder.name, folder, card)

    def _check_weights(self, weights: Path, size: int) -> None:
        """Check the weights file as far as that needs no reading."""
        try:
            found = weights.stat()
        except OSError as error:
            if self._partial and isinstance(error, FileNotFoundError):
                return
            raise WeightsCorrupt(f"{weights}: {error.strerror}; put the file that the card names there") from error
        if not S_ISREG(found.st_mode):
            raise WeightsCorrupt(f"{weights}: no regular file")
        if found.st_size != size:
            raise WeightsCorrupt(f"{weights}: {found.st_size} bytes, the card says {size}; copy the file again")
        if not self._partial and not os.access(weights, os.R_OK):
            raise WeightsCorrupt(f"{weights}: {os.strerror(errno.EACCES)}; let the service's user read it")

    def _resolved(self, name: str) -> tuple[str, str | None]:
        """The model that an alias or a bare variant stands for; any other name, parsed."""
        if _ALIAS.fullmatch(name) and name not in VARIANTS:
            if not (target := self.aliases().get(name)):
                raise self._missing(name)
            id_, version = parse(target)
            if not may_be_model(self.root / id_):
                raise ModelNotFound(f"alias {name!r} stands for {target!r}, which is not in the store")
            return id_, version
        id_, version = parse(name)
        return self._of_variant(id_) if id_ in VARIANTS else id_, version

    def _of_variant(self, variant: str) -> str:
        default = f"{variant}.{DEFAULT_TAG}"
        if may_be_model(self.root / default):
            return default
        ids = [folder.name for folder in self._folders() if folder.name.partition(".")[0] == variant]
        if not ids:
            raise self._missing(default)
        if len(ids) > 1:
            names = ", ".join(map(repr, ids))
            raise ModelNotFound(f"{variant!r} alone could mean {names}; ask for one of them by its whole name")
        return ids[0]

    def _missing(self, name: str) -> ModelNotFound | WeightsUnavailable:
        """The error for a name that nothing in the store has."""
        known = [folder.name for folder in self._folders()]
        variant, _, tag = name.partition(".")
        if variant in VARIANTS and tag == DEFAULT_TAG:
            return WeightsUnavailable(
                f"the weights of {name!r} are not in the store; fetch them with 'pvt-serve pull {variant}', or let the "
                "first request do so with PVT_PULL=on_demand"
            )
        with suppress(AliasesInvalid):  # raised for requests that name an alias
            known.extend(self.aliases())
        hint = meant(name, [*known, *VARIANTS, *(f"{each}.{DEFAULT_TAG}" for each in VARIANTS)]) or ";"
        return ModelNotFound(f"no model {name!r} in the store{hint} GET /models and 'pvt-serve ls' list what there is")


def check_writable(root: Path) -> None:
    """Raises StoreNotWritable when `root` is the store of the package, where an upgrade would delete files."""
    if root.resolve() == EMBEDDED_STORE:
        raise StoreNotWritable(f"the model store {str(root)!r} is part of the package and read only; {ELSEWHERE}")


def _usable(versions: Sequence[StoredModel]) -> list[StoredModel]:
    """Those of a model's versions that are not broken, or else the first, with its failure."""
    return [model for model in versions if model.failure is None] or list(versions[:1])


def _check_name(name: str, folder: Path, card: ModelCard) -> None:
    match = MODEL_ID.fullmatch(name)
    if card.id != name:
        raise CardInvalid(f"{folder}: the card is for {card.id!r} and lies in the folder of {name!r}")
    if not match or match["variant"] != card.variant or card.variant not in VARIANTS:
        raise CardInvalid(
            f"{folder}: a model is named <variant>.<tag> with the card's variant {card.variant!r}, one of: "
            + ", ".join(VARIANTS)
        )
