"""Atomic writes: files and folders that appear whole or not at all, whatever ends the process that writes them."""

import errno
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
    that is killed leaves it. `durable` waits until the file and its name are on the disk. An error leaves `target`.
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
    """Write `content`, text as UTF-8, to `target`; see `atomic_path`."""
    with atomic_path(target, temporary=temporary, durable=durable) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def staging_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, with a name that begins with `prefix`, which is removed when the block ends.

    Folders that killed processes have left are removed too: each is locked for as long as its block lasts.
    """
    with locked(parent):  # a folder is never seen without its lock
        for old in parent.glob(f"{prefix}*"):
            with suppress(OSError), locked(old, wait=False):  # BlockingIOError: it is in use
                shutil.rmtree(old)
        folder = Path(mkdtemp(prefix=prefix, dir=parent))
        lock = ExitStack()
        lock.enter_context(locked(folder))
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the kernel's lock on a folder, or on a file, which is made if it is missing. It ends with its process.

    NFS can't lock folders: there the block runs without a lock, or an OSError is raised with `wait=False`.

    Raises:
        BlockingIOError: another block holds the lock, and `wait` is false.
        OSError: the path can't be opened.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk, and survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def read_small(path: Path, max_bytes: int, kind: str) -> bytes:
    """The bytes of a regular file; raises an OSError for anything else, and for more bytes than a `kind` can have."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError(errno.EINVAL, "no regular file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes, which no {kind} is")
    return content
