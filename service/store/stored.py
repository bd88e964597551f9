"""What a store says of its models: every version with its card, or with what is wrong with it."""

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.architecture.variants import VARIANTS
from service.errors import AliasesInvalid, CardInvalid, ModelLoadFailed, WeightsCorrupt
from service.store.cards import ModelCard, read_card
from service.store.names import MODEL_ID, VERSION


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A version of a model in the store: with its card, or with the reason why it can't be used.

    The version of a model without any is empty.
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
        """The architecture's name, as the model's id gives it."""
        return self.id.partition(".")[0]

    def require_card(self) -> ModelCard:
        """The card; raises the model's failure when there is none."""
        if self.card is None:
            raise self.failure or CardInvalid(f"{self.id} has no card")
        return self.card


@dataclass(frozen=True, slots=True)
class Contents:
    """All of a store at one moment: each model's versions, newest first, and the aliases or what is wrong with them."""

    versions: Mapping[str, Sequence[StoredModel]]
    aliases: Mapping[str, str]
    aliases_failure: AliasesInvalid | None = None

    @property
    def models(self) -> list[StoredModel]:
        """The version of each model that answers to its name alone."""
        return [usable(versions)[0] for versions in self.versions.values()]

    def aliases_of(self, name: str) -> list[str]:
        """The aliases that stand for exactly this: a model's id, or a version's key."""
        return [alias for alias, target in self.aliases.items() if target == name]


def usable(versions: Sequence[StoredModel]) -> list[StoredModel]:
    """Those of a model's versions that are not broken, or else the first, which tells what is wrong."""
    return [model for model in versions if model.failure is None] or list(versions[:1])


def read_versions(folder: Path, *, partial: bool) -> list[StoredModel]:
    """Every version of the model in `folder`, newest first; at least one, which carries a failure if there is none.

    `partial` takes a version without its weights file for whole.
    """
    try:
        numbered = [path for path in folder.iterdir() if VERSION.fullmatch(path.name)]
    except OSError as error:
        return [StoredModel(folder.name, "", folder, None, CardInvalid(f"{folder}: {error.strerror or error}"))]
    if not numbered:
        failure = CardInvalid(f"{folder}: no version folder (1, 2, ...) in it")
        return [StoredModel(folder.name, "", folder, None, failure)]
    newest_first = sorted(numbered, key=lambda path: int(path.name), reverse=True)
    return [_read(folder.name, version, partial=partial) for version in newest_first]


def _read(id_: str, folder: Path, *, partial: bool) -> StoredModel:
    try:
        card = read_card(folder)
        _check(id_, folder, card, partial=partial)
    except ModelLoadFailed as failure:
        return StoredModel(id_, folder.name, folder, None, failure)
    return StoredModel(id_, folder.name, folder, card)


def _check(name: str, folder: Path, card: ModelCard, *, partial: bool) -> None:
    """What can be checked without reading the weights."""
    match = MODEL_ID.fullmatch(name)
    if card.id != name:
        raise CardInvalid(f"{folder}: the card is for {card.id!r} and lies in the folder of {name!r}")
    if not match or match["variant"] != card.variant or card.variant not in VARIANTS:
        raise CardInvalid(
            f"{folder}: a model is named <variant>.<tag> with the card's variant {card.variant!r}, one of: "
            + ", ".join(VARIANTS)
        )
    weights = folder / card.weights.file
    try:
        size = weights.stat().st_size
        regular = weights.is_file()
    except OSError as error:
        if partial and isinstance(error, FileNotFoundError):
            return
        raise WeightsCorrupt(f"{weights}: {error.strerror}; put the file that the card names there") from error
    if not regular:
        raise WeightsCorrupt(f"{weights}: no regular file")
    if size != card.weights.bytes:
        raise WeightsCorrupt(f"{weights}: {size} bytes, the card says {card.weights.bytes}; copy the file again")
    if not partial and not os.access(weights, os.R_OK):
        raise WeightsCorrupt(f"{weights}: {os.strerror(errno.EACCES)}; let the service's user read it")
