"""What can go wrong when a store is written to, told alike everywhere."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import StoreNotWritable

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_ADVICE = "write to a store where that is allowed (--store, PVT_MODEL_STORE)"


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Tell an OSError of the block as what it means for the store at `root`.

    Raises:
        StoreNotWritable: the message says what was wrong, and what to do.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise StoreNotWritable(
                f"the model store {str(root)!r} is full ({reason}{_left(root)}); make room"
            ) from error
        advice = _ADVICE if error.errno in _FORBIDDEN else "nothing in it was changed"
        raise StoreNotWritable(f"the model store {str(root)!r} can't be written ({reason}); {advice}") from error


def check_room(root: Path, needed: int) -> None:
    """See that there is room for `needed` bytes where the store at `root` lies.

    Raises:
        StoreNotWritable: there is not.
    """
    with writing(root):
        free = shutil.disk_usage(root).free
    if free < needed:
        raise StoreNotWritable(
            f"the model store {str(root)!r} has {free / 1e6:.1f} MB left, {needed / 1e6:.1f} MB are needed; make room"
        )


def _left(root: Path) -> str:
    try:
        return f", {shutil.disk_usage(root).free / 1e6:.1f} MB left"
    except OSError:
        return ""
