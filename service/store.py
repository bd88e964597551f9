"""The model store: a folder with one folder per model, and in it one per version.

<root>/pvt_v2_b0.digits/1/card.json
<root>/pvt_v2_b0.digits/1/model.safetensors
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from service.cards import CARD_FILE, ModelCard, WeightsFile, read_card
from service.errors import CardInvalid, ModelLoadFailed, ModelNotFound, WeightsCorrupt, WeightsUnavailable
from service.variants import VARIANTS

WEIGHTS_FILE = "model.safetensors"
DEFAULT_TAG = "in1k"  # the tag of the published ImageNet-1k weights
MODEL_ID = re.compile(r"(?P<variant>[a-z0-9_]+)\.(?P<tag>[A-Za-z0-9_-]+)")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """The newest version of a model in the store: with its card, or with the reason why it can't be used."""

    id: str
    version: str
    folder: Path
    card: ModelCard | None
    failure: ModelLoadFailed | None = None

    @property
    def variant(self) -> str:
        """The architecture's name, as the model's id gives it."""
        return self.id.partition(".")[0]

    def require_card(self) -> ModelCard:
        """The card; raises the model's failure when there is none."""
        if self.card is None:
            raise self.failure or CardInvalid(f"{self.id} has no card")
        return self.card


class Store:
    """Reads a store's folders afresh at each call, so that what was added is found and nothing is cached wrongly."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def models(self) -> list[StoredModel]:
        """Every model of the store by name; a broken one carries its failure.

        Raises:
            WeightsUnavailable: the store's folder can't be read.
        """
        try:
            folders = sorted(path for path in self.root.iterdir() if _may_be_model(path))
        except OSError as error:
            raise WeightsUnavailable(
                f"the model store {str(self.root)!r} can't be read ({error.strerror}); PVT_MODEL_STORE names its folder"
            ) from error
        return [_read(folder) for folder in folders]

    def find(self, name: str) -> StoredModel:
        """The model called `name`: `<variant>.<tag>`, or a variant alone.

        A variant alone means its ImageNet-1k weights, or the one model of that variant if the store has just one.

        Raises:
            ModelNotFound: no such model, or several that a bare variant could mean.
            WeightsUnavailable: a published model whose weights are not here.
        """
        models = {model.id: model for model in self.models()}
        if name in models:
            return models[name]
        if name in VARIANTS:
            return self._of_variant(name, models)
        variant, _, tag = name.partition(".")
        if variant in VARIANTS and tag == DEFAULT_TAG:
            raise self._unavailable(name)
        near = get_close_matches(name, [*models, *VARIANTS], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelNotFound(f"no model {name!r} in the store; {hint}GET /models lists what there is")

    def _of_variant(self, variant: str, models: dict[str, StoredModel]) -> StoredModel:
        default = f"{variant}.{DEFAULT_TAG}"
        if default in models:
            return models[default]
        candidates = [model for model in models.values() if model.variant == variant]
        if not candidates:
            raise self._unavailable(default)
        if len(candidates) > 1:
            names = ", ".join(repr(model.id) for model in candidates)
            raise ModelNotFound(f"{variant!r} alone could mean {names}; ask for one of them by its whole name")
        return candidates[0]

    def _unavailable(self, name: str) -> WeightsUnavailable:
        return WeightsUnavailable(
            f"the weights of {name!r} are not in the store; put its card.json and weights file into "
            f"{str(self.root / name / '1')!r} and ask again"
        )


def _may_be_model(path: Path) -> bool:
    """Whether it has a model's name, or nearly: lost+found and the like are nobody's mistake."""
    return (MODEL_ID.fullmatch(path.name) is not None or path.name in VARIANTS) and path.is_dir()


def _read(folder: Path) -> StoredModel:
    try:
        versions = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    except OSError as error:
        return StoredModel(folder.name, "", folder, None, CardInvalid(f"{folder}: {error.strerror or error}"))
    if not versions:
        failure = CardInvalid(f"{folder}: no version folder (1, 2, ...) in it")
        return StoredModel(folder.name, "", folder, None, failure)
    newest = versions[-1]
    try:
        card = read_card(newest)
        _check(folder.name, newest, card)
    except ModelLoadFailed as failure:
        return StoredModel(folder.name, newest.name, newest, None, failure)
    return StoredModel(folder.name, newest.name, newest, card)


def _check(name: str, folder: Path, card: ModelCard) -> None:
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
        raise WeightsCorrupt(f"{weights}: {error.strerror}; put the file that the card names there") from error
    if not regular:
        raise WeightsCorrupt(f"{weights}: no regular file")
    if size != card.weights.bytes:
        raise WeightsCorrupt(f"{weights}: {size} bytes, the card says {card.weights.bytes}; copy the file again")


def weights_file(weights: bytes) -> WeightsFile:
    """What a card says of the safetensors file with these bytes."""
    return WeightsFile(file=WEIGHTS_FILE, sha256=sha256(weights).hexdigest(), bytes=len(weights))


def write_model(
    root: Path, version: str, card: ModelCard, weights: bytes, others: Mapping[str, bytes] = MappingProxyType({})
) -> Path:
    """Put a model into the store at `root` and return its folder, which appears whole or not at all.

    `others` are the files beside card and weights, by name.

    A folder of that version which is there already is replaced.

    Raises:
        OSError: the folder can't be written.
    """
    folder = root / card.id / version
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=folder.parent) as name:
        staged = Path(name) / version
        staged.mkdir()
        for file, content in {card.weights.file: weights, **others}.items():
            (staged / file).write_bytes(content)
        (staged / CARD_FILE).write_text(card.model_dump_json(indent=2, exclude_none=True) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
    return folder
