"""What can go wrong when a store is written to, told alike everywhere."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import mkdtemp
from typing import BinaryIO

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


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `target` once the block has written it; its mode is as the umask says.

    Raises:
        OSError: it can't be written; `target` is as it was.
    """
    staged = target.with_name(f".{target.name}.{token_hex(8)}.part")
    try:
        with staged.open("xb") as file:
            yield file
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def staging(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, with a name that begins with `prefix`, which goes with the block.

    Those that blocks left behind whose process was killed go too: each has a lock for as long as its block lasts.

    Raises:
        OSError: it can't be made.
    """
    with _lock(parent):  # a folder is never seen without its lock
        for left in parent.glob(f"{prefix}*"):
            with suppress(OSError), _lock(left, wait=False):  # BlockingIOError: it is in use
                shutil.rmtree(left)
        folder = Path(mkdtemp(prefix=prefix, dir=parent))
        held = ExitStack()
        held.enter_context(_lock(folder))
    with held:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise  # and so nothing is removed on a file system that locks no folders, as NFS is
        yield
    finally:
        os.close(descriptor)


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
