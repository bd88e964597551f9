"""The model store that is used when no setting names one."""

import shutil
from pathlib import Path

from service.store.writes import EMBEDDED_STORE, staging, writing

_CURRENT = Path("model_store")
_USERS = Path("~/.local/share/pvt-serve/model_store")


def default_store() -> Path:
    """`model_store` in the current folder, else the user's own store, else the read-only one of the package."""
    stores = (_CURRENT, _users_store(), EMBEDDED_STORE)
    return next((each for each in stores if each and _is_folder(each)), _CURRENT)


def writable_default_store() -> tuple[Path, bool]:
    """As `default_store`, but the user's own store in place of the read-only one, and whether it has just been made.

    A new one holds a copy of the embedded model, so that the default model is still found.

    Raises:
        StoreNotWritable: it can't be made.
    """
    store, users = default_store(), _users_store()
    if store != EMBEDDED_STORE or users is None:
        return store, False
    with writing(users):
        users.parent.mkdir(parents=True, exist_ok=True)
        with staging(users.parent, ".new-") as folder:
            made = _copied(EMBEDDED_STORE, folder / users.name)
            if users.is_dir():  # another process has made it meanwhile
                return users, False
            made.rename(users)
    return users, True


def _copied(source: Path, target: Path) -> Path:
    """`target`, with the modes that the umask says: those of a package may be read only."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _copied(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
    return target


def _is_folder(path: Path) -> bool:
    """Whether it is one, as far as this user can see: neither the current folder nor HOME need be one's own."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _users_store() -> Path | None:
    try:
        return _USERS.expanduser()
    except RuntimeError:  # the user has no home folder
        return None
