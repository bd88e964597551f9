"""A folder of this machine that holds what a remote store says of its models: cards and aliases, no weights."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from service.store.cards import CARD_FILE
from service.store.locations import Location, reason, root
from service.store.names import ALIASES_FILE, VERSION, may_be_model
from service.store.writes import replacing

_LISTED = ".listed"  # there once the whole store has been listed


class Mirror:
    """Copies the small files of `location` into `folder`. Blocking; one thread at a time, several processes at will."""

    def __init__(self, location: Location, folder: Path) -> None:
        self.location = location
        self.folder = folder
        # Mutable state: which files are as they were when last read, and why the others could not be.
        self._tags: dict[str, str] = {}
        self.problems: Mapping[str, str] = {}

    @property
    def complete(self) -> bool:
        """Whether the store was copied at least once, by this process or an earlier one."""
        return is_there(self.folder / _LISTED)

    def sync(self) -> None:
        """Make the folder what the store is now. Where that fails, it stays what it was.

        Raises:
            StoreUnreachable: the store can't be listed.
            OSError: the folder can't be written.
        """
        files = self.location.files()
        folders = {path.rpartition("/")[0] for path in files} - {""}
        small = [path for path in files if path == ALIASES_FILE or path.endswith(f"/{CARD_FILE}")]
        wanted = [path for path in small if not (files[path] and self._known(path) == files[path])]
        got = self.location.read(wanted)
        if wanted and all(isinstance(content, Exception) and _is_no_answer(content) for content in got.values()):
            raise self.location.unreachable(next(e for e in got.values() if isinstance(e, Exception)))
        self.folder.mkdir(parents=True, exist_ok=True)
        problems = {path: why for path, why in self.problems.items() if path in small and path not in wanted}
        for folder in folders:
            with _telling(problems, f"{folder}/{CARD_FILE}"):
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted(got, key=lambda path: path == ALIASES_FILE):  # aliases last: what they name is there then
            content = got[path]
            self._tags.pop(path, None)
            with _telling(problems, path):
                if not isinstance(content, Exception):
                    self._take(path, content)
                    self._tags[path] = files[path]
                    continue
                problems[path] = reason(content)
                if not _is_no_answer(content):  # what is known of it stays while it can't be asked about
                    (self.folder / path).unlink(missing_ok=True)
        self.problems = problems
        self._drop(folders, keep_aliases=ALIASES_FILE in files)
        (self.folder / _LISTED).touch()

    def _known(self, path: str) -> str | None:
        """The tag of what is here of `path`; somebody may have emptied the folder."""
        tag = self._tags.get(path)
        return tag if path in self.problems or is_there(self.folder / path) else None

    def _take(self, path: str, content: bytes) -> None:
        target = self.folder / path
        with suppress(OSError):  # what can't be read may yet be replaced
            if target.read_bytes() == content:
                return
        if target.name == CARD_FILE:  # another card speaks of other weights
            for other in target.parent.iterdir():
                other.unlink()
        with replacing(target) as file:
            file.write(content)

    def _drop(self, folders: set[str], *, keep_aliases: bool) -> None:
        """Remove what is no longer in the store."""
        if not keep_aliases:
            (self.folder / ALIASES_FILE).unlink(missing_ok=True)
        models = {folder.partition("/")[0] for folder in folders}
        for model in [path for path in self.folder.iterdir() if may_be_model(path)]:
            with suppress(OSError):  # what can't be looked at is told of when it is read
                for version in model.iterdir():
                    if VERSION.fullmatch(version.name) and f"{model.name}/{version.name}" not in folders:
                        shutil.rmtree(version, ignore_errors=True)
            if model.name not in models:
                shutil.rmtree(model, ignore_errors=True)


@contextmanager
def _telling(problems: dict[str, str], path: str) -> Iterator[None]:
    """What keeps one file from being written is a problem of that file; what keeps all is not.

    Raises:
        OSError: the disk is full, or can only be read.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            raise
        problems[path] = (
            f"its copy {error.filename or path} can't be written: {error.strerror or error}; "
            "PVT_STORE_CACHE_DIR names the folder for copies"
        )


def _is_no_answer(error: Exception) -> bool:
    """Whether it says that the store is away, rather than something of a file."""
    cause = root(error)
    status = getattr(cause, "status", None)
    return not isinstance(cause, FileNotFoundError | PermissionError) and status not in {401, 403, 404, 410}


def is_there(path: Path) -> bool:
    """Whether there is such a file, as far as can be seen."""
    try:
        return path.exists()
    except OSError:
        return False
