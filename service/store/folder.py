"""Changes to the folder of a model store: which folder is the default, and models into it and out of it."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from os.path import isdir
from pathlib import Path
from types import MappingProxyType

from service.errors import InvalidRequest, StoreNotWritable
from service.files import staging_folder
from service.store.cards import CARD_FILE, ModelCard, WeightsFile, card_json
from service.store.store import ELSEWHERE, EMBEDDED_STORE, VERSION, Store, StoredModel, check_writable, parse

WEIGHTS_FILE = "model.safetensors"
_CURRENT = Path("model_store")
_USERS = Path("~/.local/share/pvt-serve/model_store")


def default_store() -> Path:
    """`model_store` in the current folder, else the user's own store, else the read-only one of the package."""
    stores = (_CURRENT, _users_store(), EMBEDDED_STORE)
    return next((each for each in stores if each and isdir(each)), _CURRENT)  # noqa: PTH112  False if it is forbidden


def writable_default_store() -> tuple[Path, bool]:
    """As `default_store`, but the user's own store in place of the read-only one, and whether it is new.

    A new one holds a copy of the embedded model, so that the default model is still found.
    Raises StoreNotWritable if it can't be made.
    """
    store, users = default_store(), _users_store()
    if store != EMBEDDED_STORE or users is None:
        return store, False
    with writing(users):
        users.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(users.parent, ".new-") as folder:
            copy = _copied(EMBEDDED_STORE, folder / users.name)
            if users.is_dir():  # another process made it meanwhile
                return users, False
            copy.rename(users)
    return users, True


def _copied(source: Path, target: Path) -> Path:
    """A copy of the folder `source`, at `target`, with the umask's modes: those of a package may be read only."""
    target.mkdir()
    for path in source.iterdir():
        (_copied if path.is_dir() else shutil.copyfile)(path, target / path.name)
    return target


def _users_store() -> Path | None:
    try:
        return _USERS.expanduser()
    except RuntimeError:  # the user has no home folder
        return None


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn an OSError of the block into StoreNotWritable, which says what was wrong with the store at `root`."""
    check_writable(root)
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StoreNotWritable(
                f"the model store {str(root)!r} is full ({reason}{_free(root)}); make room"
            ) from error
        forbidden = error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}
        advice = ELSEWHERE if forbidden else "nothing in it was changed"
        raise StoreNotWritable(f"the model store {str(root)!r} can't be written ({reason}); {advice}") from error


def _free(root: Path) -> str:
    try:
        return f", {shutil.disk_usage(root).free / 1e6:.1f} MB left"
    except OSError:
        return ""


def check_room(root: Path, needed: int) -> None:
    """Raises StoreNotWritable unless `needed` bytes are free where the store at `root` lies."""
    with writing(root):
        free = shutil.disk_usage(root).free
    if free < needed:
        raise StoreNotWritable(
            f"the model store {str(root)!r} has {free / 1e6:.1f} MB left, {needed / 1e6:.1f} MB are needed; make room"
        )


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
    Raises an OSError if the folder can't be written.
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
        if not (target := model / version).exists():
            return staged.rename(target)
        replaced = target.rename(folder / "replaced")
        try:
            return staged.rename(target)
        except OSError:
            replaced.rename(target)
            raise


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
    id_, version = parse(name)
    versions = store.versions(id_)
    found = [each for each in versions if version in {None, each.version}] or store.candidates(name)
    keys = {each.key for each in found} | (set() if len(versions) > len(found) else {id_})
    if aliases := [alias for alias, target in store.aliases().items() if target in keys]:
        raise InvalidRequest(
            f"{name} is what {', '.join(map(repr, aliases))} stands for; point the alias elsewhere or remove it first"
        )
    return found


def remove(root: Path, found: list[StoredModel]) -> None:
    """Remove versions of a model: their folders leave it at once, then their files are deleted.

    Raises StoreNotWritable if the store at `root` can't be written.
    """
    with writing(root), staging_folder(root, ".gone-") as trash:
        model = root / found[0].id
        rest = {path.name for path in model.iterdir() if VERSION.fullmatch(path.name)} - {
            each.version for each in found
        }
        for folder in [model / each.version for each in found] if rest else [model]:
            folder.rename(trash / folder.name)
