"""Atomic writes: files and folders that appear whole or not at all, whatever ends the process that writes them."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import file_digest
from pathlib import Path
from secrets import token_hex
from tempfile import mkdtemp


@contextmanager
def atomic_path(target: Path, *, temporary: Path | None = None, durable: bool = False) -> Iterator[Path]:
    """The path of a new file, which replaces `target` once the block has written it; its mode is what the umask gives.

    `temporary` is that path, on the same file system. None: one beside `target` that no other writer uses; a process
    that is killed leaves it. `durable` waits until the file and its name are on the disk.

    Raises:
        OSError: it can't be written; `target` is unchanged.
    """
    new = temporary or target.with_name(f".{target.name}.{token_hex(8)}.part")
    try:
        yield new
        if durable:
            sync(new)
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if durable:
        sync(target.parent)


def atomic_write(target: Path, content: bytes | str, *, temporary: Path | None = None, durable: bool = False) -> None:
    """Write `content`, text as UTF-8, to `target`; see `atomic_path`.

    Raises:
        OSError: it can't be written; `target` is unchanged.
    """
    with atomic_path(target, temporary=temporary, durable=durable) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def staging_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, with a name that begins with `prefix`, which is removed when the block ends.

    Folders that killed processes have left are removed too: each is locked for as long as its block lasts.

    Raises:
        OSError: it can't be made.
    """
    with _locked(parent):  # a folder is never seen without its lock
        for old in parent.glob(f"{prefix}*"):
            with suppress(OSError), _locked(old, wait=False):  # BlockingIOError: it is in use
                shutil.rmtree(old)
        folder = Path(mkdtemp(prefix=prefix, dir=parent))
        lock = ExitStack()
        lock.enter_context(_locked(folder))
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk, and survive a power cut.

    Raises:
        OSError: they can't be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise  # and so nothing is removed on a file system that can't lock folders, such as NFS
        yield
    finally:
        os.close(descriptor)
