"""A folder of this machine that holds what a remote store says of its models: cards and aliases, no weights."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile

from service.store.aliases import ALIASES_FILE
from service.store.cards import CARD_FILE
from service.store.locations import Location, reason, root
from service.store.names import VERSION

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
        return (self.folder / _LISTED).exists()

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
        for folder in folders:
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        problems = {path: why for path, why in self.problems.items() if path in small and path not in wanted}
        for path in sorted(got, key=lambda path: path == ALIASES_FILE):  # aliases last: what they name is there then
            content = got[path]
            if isinstance(content, Exception):
                problems[path] = reason(content)
                self._tags.pop(path, None)
                if not _is_no_answer(content):  # what is known of it stays while it can't be asked about
                    (self.folder / path).unlink(missing_ok=True)
            else:
                self._take(path, content)
                self._tags[path] = files[path]
        self.problems = problems
        self._drop(folders, keep_aliases=ALIASES_FILE in files)
        (self.folder / _LISTED).touch()

    def _known(self, path: str) -> str | None:
        """The tag of what is here of `path`; somebody may have emptied the folder."""
        tag = self._tags.get(path)
        return tag if path in self.problems or (self.folder / path).exists() else None

    def _take(self, path: str, content: bytes) -> None:
        target = self.folder / path
        if target.exists() and target.read_bytes() == content:
            return
        if target.name == CARD_FILE:  # another card speaks of other weights
            for other in target.parent.iterdir():
                other.unlink()
        _replace(target, content)

    def _drop(self, folders: set[str], *, keep_aliases: bool) -> None:
        """Remove what is no longer in the store."""
        if not keep_aliases:
            (self.folder / ALIASES_FILE).unlink(missing_ok=True)
        models = {folder.partition("/")[0] for folder in folders}
        for model in [path for path in self.folder.iterdir() if path.is_dir()]:
            for version in model.iterdir():
                if VERSION.fullmatch(version.name) and f"{model.name}/{version.name}" not in folders:
                    shutil.rmtree(version, ignore_errors=True)
            if model.name not in models:
                shutil.rmtree(model, ignore_errors=True)


def _is_no_answer(error: Exception) -> bool:
    """Whether it says that the store is away, rather than something of a file."""
    cause = root(error)
    status = getattr(cause, "status", None)
    return not isinstance(cause, FileNotFoundError | PermissionError) and status not in {401, 403, 404, 410}


def _replace(target: Path, content: bytes) -> None:
    with NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".part", delete=False) as file:
        try:
            file.write(content)
            file.flush()  # a full disk is told of here at the latest, and not when the file is closed
        except OSError:
            Path(file.name).unlink()
            raise
    os.replace(file.name, target)  # noqa: PTH105
