"""The model store: a folder with one folder per model, and in it one per version.

<root>/aliases.json
<root>/pvt_v2_b0.digits/1/card.json
<root>/pvt_v2_b0.digits/1/model.safetensors
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from service.architecture.variants import VARIANTS
from service.errors import (
    AliasesInvalid,
    CardInvalid,
    ModelLoadFailed,
    ModelNotFound,
    WeightsCorrupt,
    WeightsUnavailable,
)
from service.store.cards import ModelCard, read_card
from service.store.names import (
    DEFAULT_TAG,
    MODEL_ID,
    VERSION,
    ModelName,
    alias_name,
    alias_target,
    delete_alias,
    may_be_alias,
    may_be_model,
    parse,
    read_aliases,
    write_alias,
)


@dataclass(frozen=True, slots=True)
class StoredModel:
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

    @property
    def variant(self) -> str:
        """The architecture's name, from the model's id."""
        return self.id.partition(".")[0]

    def require_card(self) -> ModelCard:
        """The card; raises the model's failure when there is none."""
        if self.card is None:
            raise self.failure or CardInvalid(f"{self.id} has no card")
        return self.card


@dataclass(frozen=True, slots=True)
class Contents:
    """A whole store at one moment: each model's versions, newest first, and the aliases or what is wrong with them."""

    versions: Mapping[str, Sequence[StoredModel]]
    aliases: Mapping[str, str]
    aliases_failure: AliasesInvalid | None = None

    @property
    def models(self) -> list[StoredModel]:
        """For each model, the version that its name alone stands for."""
        return [_usable(versions)[0] for versions in self.versions.values()]

    def aliases_of(self, name: str) -> list[str]:
        """The aliases that stand for exactly this: a model's id, or a version's key."""
        return [alias for alias, target in self.aliases.items() if target == name]


class Store:
    """Reads a store's folders at each call, so that new models are found and nothing is cached wrongly.

    `partial` says that weights may lie elsewhere: a version without its weights file is then no failure.
    """

    def __init__(self, root: Path, *, partial: bool = False) -> None:
        self.root = root.absolute()
        self._partial = partial

    def models(self) -> list[StoredModel]:
        """Every model of the store by name, in the newest version that is not broken, or else the newest.

        Raises:
            WeightsUnavailable: the store's folder can't be read.
        """
        return self.contents().models

    def contents(self) -> Contents:
        """Everything in the store.

        Raises:
            WeightsUnavailable: the store's folder can't be read.
        """
        self._refresh()
        versions = {folder.name: self._read(folder) for folder in self._folders()}
        try:
            return Contents(versions, self.aliases())
        except AliasesInvalid as failure:
            return Contents(versions, {}, failure)

    def versions(self, id_: str) -> list[StoredModel]:
        """Every version of a model, newest first; a broken one has its failure.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has no model with this id.
        """
        self._refresh()
        if folder := self._folder(id_):
            found = self._read(folder)
            if not found[0].version:
                self._folders()  # raises if the whole store can't be read, not this model alone
            return found
        raise self._missing(id_)

    def find(self, name: str) -> StoredModel:
        """The model called `name`: `<variant>.<tag>`, with `@<version>` or without, a variant alone, or an alias.

        A variant alone means its ImageNet-1k weights, or the one model of that variant if the store has just one.

        Raises:
            ModelNotFound: no such model or version, or several that a bare variant could mean.
            WeightsUnavailable: a published model whose weights are not in the store.
            AliasesInvalid: it could be an alias, and the aliases can't be read.
        """
        return self.candidates(name)[0]

    def candidates(self, name: str) -> list[StoredModel]:
        """The versions that `name` may stand for, best first: the one it names, or all that are not broken.

        The newest come first. Where all are broken, the newest with its failure.

        Raises:
            ModelNotFound, WeightsUnavailable, AliasesInvalid: as `find`.
        """
        self._refresh()
        requested = self._resolved(name)
        versions = self.versions(requested.id)
        if requested.version is None:
            return _usable(versions)
        if named := [model for model in versions if model.version == requested.version]:
            return named
        present = ", ".join(model.version for model in versions if model.version) or "none"
        raise ModelNotFound(f"{requested.id!r} has no version {requested.version!r}; there are: {present}")

    def aliases(self) -> dict[str, str]:
        """Every alias, and the model or the version of one that it stands for.

        Raises:
            AliasesInvalid: the aliases can't be read.
        """
        self._refresh()
        return {name: str(target) for name, target in read_aliases(self.root).items()}

    def set_alias(self, name: str, target: str) -> None:
        """Make `name` stand for `target`, `<id>` or `<id>@<version>`, for everyone who uses this store.

        Raises:
            InvalidRequest: one of the two is not of its form.
            ModelNotFound, WeightsUnavailable, ModelLoadFailed: `target` is not in the store, or broken.
            AliasesInvalid, StoreNotWritable: nothing was changed; the message says why.
        """
        alias_name(name)
        self.find(str(alias_target(target))).require_card()
        write_alias(self.root, name, target)

    def remove_alias(self, name: str) -> None:
        """Remove the alias `name`.

        Raises:
            ModelNotFound: there is no such alias.
            AliasesInvalid, StoreNotWritable: nothing was changed; the message says why.
        """
        delete_alias(self.root, name)

    @contextmanager
    def holding(self, stored: StoredModel) -> Iterator[StoredModel]:
        """All files of `stored` are local for as long as the context lasts; in a local store they always are."""
        yield stored

    def close(self) -> None:
        """Stop what is under way."""

    def _refresh(self) -> None:
        """Bring the folder up to date before it is read; a local store always is."""

    def _read(self, folder: Path) -> list[StoredModel]:
        return _read_versions(folder, partial=self._partial)

    def _folders(self) -> list[Path]:
        try:
            return sorted(path for path in self.root.iterdir() if may_be_model(path))
        except OSError as error:
            raise WeightsUnavailable(
                f"the model store {str(self.root)!r} can't be read ({error.strerror}); PVT_MODEL_STORE names its folder"
            ) from error

    def _folder(self, id_: str) -> Path | None:
        """The model's folder; None where there is none, or `id_` is no model's name."""
        return self.root / id_ if may_be_model(self.root / id_) else None

    def _resolved(self, name: str) -> ModelName:
        """The model that an alias or a bare variant stands for; any other name, parsed."""
        if may_be_alias(name):
            if target := read_aliases(self.root).get(name):
                if self._folder(target.id):
                    return target
                raise ModelNotFound(f"alias {name!r} stands for {str(target)!r}, which is not in the store")
            raise self._missing(name)
        requested = parse(name)
        return requested._replace(id=self._of_variant(requested.id)) if requested.id in VARIANTS else requested

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
        with suppress(AliasesInvalid):  # raised for requests that name an alias
            known.extend(read_aliases(self.root))
        near = get_close_matches(name, [*known, *VARIANTS], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return ModelNotFound(f"no model {name!r} in the store; {hint}GET /models and 'pvt-serve ls' list what there is")


def _usable(versions: Sequence[StoredModel]) -> list[StoredModel]:
    """Those of a model's versions that are not broken, or else the first, with its failure."""
    return [model for model in versions if model.failure is None] or list(versions[:1])


def _read_versions(folder: Path, *, partial: bool) -> list[StoredModel]:
    """Every version of the model in `folder`, newest first; at least one, which has a failure if there is none."""
    try:
        numbered = [path for path in folder.iterdir() if VERSION.fullmatch(path.name)]
    except OSError as error:
        return [StoredModel(folder.name, "", folder, None, CardInvalid(f"{folder}: {error.strerror or error}"))]
    if not numbered:
        failure = CardInvalid(f"{folder}: no version folder (1, 2, ...) in it")
        return [StoredModel(folder.name, "", folder, None, failure)]
    newest_first = sorted(numbered, key=lambda path: int(path.name), reverse=True)
    return [_read_version(folder.name, version, partial=partial) for version in newest_first]


def _read_version(id_: str, folder: Path, *, partial: bool) -> StoredModel:
    try:
        card = read_card(folder)
        _check_name(id_, folder, card)
        _check_weights(folder / card.weights.file, card.weights.bytes, partial=partial)
    except ModelLoadFailed as failure:
        return StoredModel(id_, folder.name, folder, None, failure)
    return StoredModel(id_, folder.name, folder, card)


def _check_name(name: str, folder: Path, card: ModelCard) -> None:
    match = MODEL_ID.fullmatch(name)
    if card.id != name:
        raise CardInvalid(f"{folder}: the card is for {card.id!r} and lies in the folder of {name!r}")
    if not match or match["variant"] != card.variant or card.variant not in VARIANTS:
        raise CardInvalid(
            f"{folder}: a model is named <variant>.<tag> with the card's variant {card.variant!r}, one of: "
            + ", ".join(VARIANTS)
        )


def _check_weights(weights: Path, size: int, *, partial: bool) -> None:
    """Check the weights file as far as that needs no reading."""
    try:
        actual = weights.stat().st_size
        regular = weights.is_file()
    except OSError as error:
        if partial and isinstance(error, FileNotFoundError):
            return
        raise WeightsCorrupt(f"{weights}: {error.strerror}; put the file that the card names there") from error
    if not regular:
        raise WeightsCorrupt(f"{weights}: no regular file")
    if actual != size:
        raise WeightsCorrupt(f"{weights}: {actual} bytes, the card says {size}; copy the file again")
    if not partial and not os.access(weights, os.R_OK):
        raise WeightsCorrupt(f"{weights}: {os.strerror(errno.EACCES)}; let the service's user read it")
