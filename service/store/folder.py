"""The folder of a model store: which one is the default, whether it may be written, and why writing it failed."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import StoreNotWritable
from service.files import staging_folder

EMBEDDED_STORE = Path(__file__).parent.parent / "data" / "model_store"
"""The store that is part of the package, with the embedded model. An upgrade replaces it."""
_CURRENT = Path("model_store")
_USERS = Path("~/.local/share/pvt-serve/model_store")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_ADVICE = "write to a store where that is allowed (--store, PVT_MODEL_STORE)"


def default_store() -> Path:
    """`model_store` in the current folder, else the user's own store, else the read-only one of the package."""
    stores = (_CURRENT, _users_store(), EMBEDDED_STORE)
    return next((each for each in stores if each and _is_folder(each)), _CURRENT)


def writable_default_store() -> tuple[Path, bool]:
    """As `default_store`, but the user's own store in place of the read-only one, and whether it is new.

    A new one holds a copy of the embedded model, so that the default model is still found.

    Raises:
        StoreNotWritable: it can't be made.
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
        if path.is_dir():
            _copied(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
    return target


def _is_folder(path: Path) -> bool:
    """Whether it is a folder, as far as this user can see: the current folder and HOME may be another user's."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _users_store() -> Path | None:
    try:
        return _USERS.expanduser()
    except RuntimeError:  # the user has no home folder
        return None


def check_writable(root: Path) -> None:
    """Raises StoreNotWritable when `root` is the store of the package, where an upgrade would delete files."""
    if root.resolve() == EMBEDDED_STORE:
        raise StoreNotWritable(f"the model store {str(root)!r} is part of the package and read only; {_ADVICE}")


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn an OSError of the block into the error of the store at `root`.

    Raises:
        StoreNotWritable: the message says what was wrong, and what to do.
    """
    check_writable(root)
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise StoreNotWritable(
                f"the model store {str(root)!r} is full ({reason}{_free(root)}); make room"
            ) from error
        advice = _ADVICE if error.errno in _FORBIDDEN else "nothing in it was changed"
        raise StoreNotWritable(f"the model store {str(root)!r} can't be written ({reason}); {advice}") from error


def check_room(root: Path, needed: int) -> None:
    """Check that `needed` bytes are free where the store at `root` lies.

    Raises:
        StoreNotWritable: they are not.
    """
    with writing(root):
        free = shutil.disk_usage(root).free
    if free < needed:
        raise StoreNotWritable(
            f"the model store {str(root)!r} has {free / 1e6:.1f} MB left, {needed / 1e6:.1f} MB are needed; make room"
        )


def _free(root: Path) -> str:
    try:
        return f", {shutil.disk_usage(root).free / 1e6:.1f} MB left"
    except OSError:
        return ""
