"""The images that a command is to work on: files, folders, patterns, standard input, and lists of files."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic, iglob  # pathlib's own takes no absolute patterns
from io import BytesIO
from pathlib import Path

from cli.terminal import USAGE, CommandError
from service.labelled.folder import IMAGE_SUFFIXES

STANDARD_INPUT = "-"


class StandardInput(BytesIO):
    """The image that was on standard input."""

    name = STANDARD_INPUT

    def __str__(self) -> str:
        return self.name


Source = Path | StandardInput


@dataclass(frozen=True, slots=True)
class Images:
    """Images in their order, as often as they are iterated: those of a folder sorted by name, without hidden ones."""

    arguments: Sequence[str | StandardInput]
    listed: Sequence[str]
    """Names from a list: a file that is missing is one of the images, which then fails."""

    def __iter__(self) -> Iterator[Source]:
        for argument in self.arguments:
            yield from _expanded(argument) if isinstance(argument, str) else (argument,)
        for name in self.listed:
            yield from _in_folder(name) if Path(name).is_dir() else (Path(name),)

    def count(self) -> int:
        """How many there are now."""
        return sum(1 for _ in self)


def images(arguments: Sequence[str] | None, files_from: str | None = None) -> Images:
    """The images that `arguments` name, then those that the file `files_from` lists.

    Raises:
        CommandError: an argument names nothing, there is none, or standard input is to be two things.
    """
    arguments = arguments or []
    if not arguments and files_from is None:
        raise CommandError("name images, folders, or - for standard input; or a list of them with --files-from", USAGE)
    if [*arguments, files_from].count(STANDARD_INPUT) > 1:
        raise CommandError("- is standard input, which can be only one image or one list", USAGE)
    for argument in arguments:
        if argument != STANDARD_INPUT and next(_expanded(argument), None) is None:
            folder = f"no images in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})"
            raise CommandError(f"{argument}: {folder if Path(argument).is_dir() else 'no such file'}", USAGE)
    sources = [_standard_image() if each == STANDARD_INPUT else each for each in arguments]
    found = Images(sources, _listed(files_from) if files_from is not None else ())
    if next(iter(found), None) is None:
        raise CommandError(f"{files_from}: no files are listed", USAGE)
    return found


def one_image(argument: str) -> Source:
    """The one image that `argument` names; raises CommandError if it names none, or several."""
    if argument == STANDARD_INPUT:
        return _standard_image()
    if not Path(argument).is_file():
        what = "a folder; name one image" if Path(argument).is_dir() else "no such file"
        raise CommandError(f"{argument}: {what}", USAGE)
    return Path(argument)


def _standard_image() -> StandardInput:
    data = _standard_bytes("an image into it, as in 'pvt-serve predict - < cat.jpg'")
    if not data:
        raise CommandError("standard input is empty: - needs an image there", USAGE)
    return StandardInput(data)


def _standard_bytes(what: str) -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise CommandError(f"standard input is a terminal: pipe {what}", USAGE)
    return sys.stdin.buffer.read()


def _listed(file: str) -> list[str]:
    """The names in a list: separated by NUL if it has one, else by the ends of lines."""
    if file == STANDARD_INPUT:
        data = _standard_bytes("a list of files into it, as in 'find . -name \"*.jpg\" -print0 | pvt-serve ...'")
    else:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise CommandError(f"--files-from {file}: {error.strerror or error}", USAGE) from error
    names = data.split(b"\0") if b"\0" in data else data.replace(b"\r\n", b"\n").split(b"\n")
    return [os.fsdecode(name) for name in names if name]


def _expanded(argument: str) -> Iterator[Path]:
    if Path(argument).is_dir():
        yield from _in_folder(argument)
    elif Path(argument).exists():
        yield Path(argument)
    elif has_magic(argument):
        yield from (Path(each) for each in sorted(iglob(argument, recursive=True)) if Path(each).is_file())  # noqa: PTH207


def _in_folder(folder: str) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent, name)
