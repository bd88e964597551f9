"""The pictures that arguments name: files, folders with all that is in them, patterns."""

import os
from collections.abc import Iterator, Sequence
from glob import has_magic, iglob  # pathlib's own takes no absolute patterns
from pathlib import Path

from cli.terminal import USAGE, CommandError

SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def pictures(arguments: Sequence[str]) -> Iterator[Path]:
    """The pictures in their order: files as named, those of a folder sorted by name, hidden ones left out.

    Raises:
        CommandError: an argument names nothing; none of them was gone through.
    """
    for argument in arguments:
        _check(argument)
    return (path for argument in arguments for path in _of(argument))


def _check(argument: str) -> None:
    if Path(argument).is_dir():
        if next(_within(argument), None) is None:
            raise CommandError(f"{argument}: no pictures in this folder ({' '.join(sorted(SUFFIXES))})", USAGE)
    elif not Path(argument).exists() and not _matches(argument):
        raise CommandError(f"{argument}: no such file", USAGE)


def _matches(argument: str) -> bool:
    return has_magic(argument) and next(iglob(argument, recursive=True), None) is not None  # noqa: PTH207


def _of(argument: str) -> Iterator[Path]:
    if Path(argument).is_dir():
        yield from _within(argument)
    elif Path(argument).exists() or not has_magic(argument):
        yield Path(argument)
    else:
        yield from (Path(each) for each in sorted(iglob(argument, recursive=True)) if Path(each).is_file())  # noqa: PTH207


def _within(folder: str) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent, name)
