"""Models into the folder of a store, and out of it. Each appears and disappears whole."""

import errno
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from types import MappingProxyType

from service.errors import InvalidRequest
from service.files import staging_folder
from service.store.cards import CARD_FILE, ModelCard, WeightsFile, card_json
from service.store.folder import writing
from service.store.names import VERSION, parse
from service.store.store import Store, StoredModel

WEIGHTS_FILE = "model.safetensors"


def weights_file(weights: bytes) -> WeightsFile:
    """The card's entry for the safetensors file with these bytes."""
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
    card and weights, by name. `version` None is the next one that is free; an existing folder of any other is replaced.

    Raises:
        OSError: the folder can't be written.
    """
    model = root / card.id
    root.mkdir(parents=True, exist_ok=True)
    with staging_folder(root, ".new-") as folder:
        staged = folder / "staged"
        staged.mkdir()
        for file, content in others.items():
            (staged / file).write_bytes(content)
        (staged / CARD_FILE).write_text(card_json(card), encoding="utf-8")
        if isinstance(weights, Path):
            weights.rename(staged / card.weights.file)
        else:
            (staged / card.weights.file).write_bytes(weights)
        model.mkdir(exist_ok=True)  # last, so that a process killed earlier leaves no model without a version
        if version is None:
            return _move_to_next_version(staged, model)
        target, replaced = model / version, model / f".{version}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        staged.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        return target


def _move_to_next_version(staged: Path, model: Path) -> Path:
    """Another process may take the same number at the same moment; then the one after it."""
    while True:
        taken = [int(path.name) for path in model.iterdir() if VERSION.fullmatch(path.name)]
        try:
            return staged.rename(model / str(max(taken, default=0) + 1))
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise


def removable(root: Path, name: str) -> list[StoredModel]:
    """The versions that `name`, `<variant>.<tag>` or `<variant>.<tag>@<version>`, means.

    Raises:
        InvalidRequest: an alias stands for them.
        ModelNotFound, WeightsUnavailable, AliasesInvalid: there are none, or the aliases can't be read.
    """
    store = Store(root)
    requested = parse(name)
    versions = store.versions(requested.id)
    found = [each for each in versions if requested.version in {None, each.version}] or store.candidates(name)
    keys = {each.key for each in found} | (set() if len(versions) > len(found) else {requested.id})
    if aliases := [alias for alias, target in store.aliases().items() if target in keys]:
        raise InvalidRequest(
            f"{name} is what {', '.join(map(repr, aliases))} stands for; point the alias elsewhere or remove it first"
        )
    return found


def remove(root: Path, found: list[StoredModel]) -> None:
    """Remove versions from the store at `root`: their folders move to a trash at once, then their files are deleted.

    Raises:
        StoreNotWritable: the store can't be written.
    """
    with writing(root):
        for id_ in {stored.id for stored in found}:
            model = root / id_
            removed = {stored.version for stored in found if stored.version and stored.id == id_}
            rest = {path.name for path in model.iterdir() if VERSION.fullmatch(path.name)} - removed
            trash = Path(mkdtemp(prefix=".gone-", dir=root))
            for folder in [model / version for version in removed] if rest else [model]:
                folder.rename(trash / folder.name)
            shutil.rmtree(trash)
