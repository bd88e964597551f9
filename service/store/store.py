"""The model store: a folder with one folder per model, and in it one per version.

<root>/aliases.json
<root>/pvt_v2_b0.digits/1/card.json
<root>/pvt_v2_b0.digits/1/model.safetensors
"""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

from service.architecture.variants import VARIANTS
from service.errors import AliasesInvalid, ModelNotFound, WeightsUnavailable
from service.store.aliases import delete_alias, read_aliases, write_alias
from service.store.cards import CARD_FILE, ModelCard, WeightsFile, card_json
from service.store.names import (
    DEFAULT_TAG,
    VERSION,
    ModelName,
    alias_name,
    alias_target,
    may_be_alias,
    may_be_model,
    parse,
)
from service.store.stored import Contents, StoredModel, read_versions, usable
from service.store.writes import staging

WEIGHTS_FILE = "model.safetensors"


__all__ = ["WEIGHTS_FILE", "Contents", "Store", "StoredModel", "weights_file", "write_model"]


class Store:
    """Reads a store's folders afresh at each call, so that what was added is found and nothing is cached wrongly.

    `partial` says that weights may lie elsewhere: a version without its weights file is none the worse for it.
    """

    def __init__(self, root: Path, *, partial: bool = False) -> None:
        self.root = root.absolute()
        self._partial = partial

    def models(self) -> list[StoredModel]:
        """Every model of the store by name, in the newest version that is not broken, or else the newest.

        Raises:
            WeightsUnavailable: the store's folder can't be read.
        """
        return [usable(self._read(folder))[0] for folder in self._folders()]

    def contents(self) -> Contents:
        """Everything in the store.

        Raises:
            WeightsUnavailable: the store's folder can't be read.
        """
        versions = {folder.name: self._read(folder) for folder in self._folders()}
        try:
            return Contents(versions, self.aliases())
        except AliasesInvalid as failure:
            return Contents(versions, {}, failure)

    def versions(self, id_: str) -> list[StoredModel]:
        """Every version of a model, newest first; a broken one carries its failure.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has no model with this id.
        """
        if folder := self._folder(id_):
            found = self._read(folder)
            if not found[0].version:
                self._folders()  # raises where it is not this model alone that can't be read
            return found
        raise self._missing(id_)

    def find(self, name: str) -> StoredModel:
        """The model called `name`: `<variant>.<tag>`, with `@<version>` or without, a variant alone, or an alias.

        A variant alone means its ImageNet-1k weights, or the one model of that variant if the store has just one.

        Raises:
            ModelNotFound: no such model or version, or several that a bare variant could mean.
            WeightsUnavailable: a published model whose weights are not here.
            AliasesInvalid: it could be an alias, and the aliases can't be read.
        """
        return self.candidates(name)[0]

    def candidates(self, name: str) -> list[StoredModel]:
        """What may answer to `name`, best first: the version it names, or all that are not broken, newest first.

        Where all are broken, the newest with its failure.

        Raises:
            ModelNotFound, WeightsUnavailable, AliasesInvalid: as `find`.
        """
        wanted = self._resolved(name)
        versions = self.versions(wanted.id)
        if wanted.version is None:
            return usable(versions)
        if named := [model for model in versions if model.version == wanted.version]:
            return named
        there = ", ".join(model.version for model in versions if model.version) or "none"
        raise ModelNotFound(f"{wanted.id!r} has no version {wanted.version!r}; there are: {there}")

    def aliases(self) -> dict[str, str]:
        """Every alias, and the model or the version of one that it stands for.

        Raises:
            AliasesInvalid: the aliases can't be read.
        """
        return {name: str(target) for name, target in read_aliases(self.root).items()}

    def set_alias(self, name: str, target: str) -> None:
        """Let `name` stand for `target`, `<id>` or `<id>@<version>`, from now on and for all who use this store.

        Raises:
            InvalidRequest: one of the two is not of its form.
            ModelNotFound, WeightsUnavailable, ModelLoadFailed: `target` is not in the store, or broken.
            AliasesInvalid, StoreNotWritable: nothing was changed; the message says why.
        """
        alias_name(name)
        self.find(str(alias_target(target))).require_card()
        write_alias(self.root, name, target)

    def remove_alias(self, name: str) -> None:
        """Let `name` stand for nothing.

        Raises:
            ModelNotFound: there is no such alias.
            AliasesInvalid, StoreNotWritable: nothing was changed; the message says why.
        """
        delete_alias(self.root, name)

    @contextmanager
    def holding(self, stored: StoredModel) -> Iterator[StoredModel]:
        """All files of `stored` are in its folder for as long as the context lasts; here they always are."""
        yield stored

    def close(self) -> None:
        """Give up what is under way."""

    def _read(self, folder: Path) -> list[StoredModel]:
        return read_versions(folder, partial=self._partial)

    def _folders(self) -> list[Path]:
        try:
            return sorted(path for path in self.root.iterdir() if may_be_model(path))
        except OSError as error:
            raise WeightsUnavailable(
                f"the model store {str(self.root)!r} can't be read ({error.strerror}); PVT_MODEL_STORE names its folder"
            ) from error

    def _folder(self, id_: str) -> Path | None:
        """The model's folder; None where there is none, or `id_` is no name of one."""
        return self.root / id_ if may_be_model(self.root / id_) else None

    def _resolved(self, name: str) -> ModelName:
        """Without alias and bare variant."""
        if may_be_alias(name):
            if target := read_aliases(self.root).get(name):
                if self._folder(target.id):
                    return target
                raise ModelNotFound(f"alias {name!r} stands for {str(target)!r}, which is not in the store")
            raise self._missing(name)
        wanted = parse(name)
        return wanted._replace(id=self._of_variant(wanted.id)) if wanted.is_variant else wanted

    def _of_variant(self, variant: str) -> str:
        default = f"{variant}.{DEFAULT_TAG}"
        if self._folder(default):
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
        with suppress(AliasesInvalid):  # it is said to those who ask for an alias
            known.extend(read_aliases(self.root))
        near = get_close_matches(name, [*known, *VARIANTS], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return ModelNotFound(f"no model {name!r} in the store; {hint}GET /models and 'pvt-serve ls' list what there is")


def weights_file(weights: bytes) -> WeightsFile:
    """What a card says of the safetensors file with these bytes."""
    return WeightsFile(file=WEIGHTS_FILE, sha256=sha256(weights).hexdigest(), bytes=len(weights))


def write_model(
    root: Path,
    version: str | None,
    card: ModelCard,
    weights: bytes | Path,
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Put a model into the store at `root` and return its folder, which appears whole or not at all.

    `weights` are the file's bytes, or a file on the same file system, which is moved. `others` are the files beside
    card and weights, by name. `version` None is the next one that is free; a folder of another that is there already
    is replaced.

    Raises:
        OSError: the folder can't be written.
    """
    model = root / card.id
    root.mkdir(parents=True, exist_ok=True)
    with staging(root, ".new-") as folder:
        staged = folder / "staged"
        staged.mkdir()
        for file, content in others.items():
            (staged / file).write_bytes(content)
        (staged / CARD_FILE).write_text(card_json(card), encoding="utf-8")
        if isinstance(weights, Path):
            weights.rename(staged / card.weights.file)
        else:
            (staged / card.weights.file).write_bytes(weights)
        model.mkdir(exist_ok=True)  # only now: whoever is killed before leaves no model without a version
        if version is None:
            return _placed(staged, model)
        target, replaced = model / version, model / f".{version}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        staged.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        return target


def _placed(staged: Path, model: Path) -> Path:
    """`staged` as the next version; another process may take that number at the same moment."""
    while True:
        taken = [int(path.name) for path in model.iterdir() if VERSION.fullmatch(path.name)]
        try:
            return staged.rename(model / str(max(taken, default=0) + 1))
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
