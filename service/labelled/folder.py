"""A folder with one sub-folder a class, as torchvision's `ImageFolder` reads it, and the labels its names stand for."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Literal, TypeVar

from service.errors import InvalidRequest

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
K = TypeVar("K")
V = TypeVar("V")
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}
_LISTED = 10  # names in a message


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class LabelledFolder:
    """`classes` are the sub-folders of `root` in the order of their names, each with its images.

    Those without an image are there too, since they count in the order.
    """

    root: Path
    classes: Mapping[str, Sequence[Path]]
    skipped: Sequence[Skipped]


def read_folder(root: Path) -> LabelledFolder:
    """The images in and below each sub-folder of `root`, sorted; hidden ones are left out without a word.

    Raises:
        InvalidRequest: it is no folder, can't be read, or has no sub-folder with an image.
    """
    skipped: list[Skipped] = []
    try:
        entries = sorted(each for each in root.iterdir() if not each.name.startswith("."))
        folders = [each for each in entries if each.is_dir()]
    except OSError as error:
        raise InvalidRequest(
            f"{root}: {error.strerror}; name a folder that has one sub-folder for each class"
        ) from error
    skipped += [Skipped(shown(each), "in no class's folder") for each in entries if each not in folders]
    classes = {each.name: _images(each, skipped) for each in folders}
    if not any(classes.values()):
        why = f"; {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        raise InvalidRequest(
            f"{root}: no sub-folder has images ({' '.join(sorted(IMAGE_SUFFIXES))}); name a folder that has one "
            f"sub-folder for each class{why}"
        )
    if set(map(str.lower, classes)) <= _SPLITS:
        raise InvalidRequest(f"{root}: its sub-folders {listed(classes)} are no classes; name one of them instead")
    return LabelledFolder(root, classes, skipped)


def _images(folder: Path, skipped: list[Skipped]) -> list[Path]:
    found: list[Path] = []

    def note(error: OSError) -> None:
        skipped.append(Skipped(shown(error.filename), error.strerror or str(error)))

    for parent, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                skipped.append(Skipped(shown(path), "its name is no image's"))
            elif why := _unreadable(path):
                skipped.append(Skipped(shown(path), why))
            else:
                found.append(path)
    return found


def _unreadable(path: Path) -> str | None:
    """Why it is no file to read; a pipe would be waited for."""
    try:
        return None if S_ISREG(path.stat().st_mode) else "no regular file"
    except OSError as error:
        return error.strerror or str(error)


def shown(path: object) -> str:
    """A path for a message, in which bytes that are no text are escaped."""
    return ascii(str(path))[1:-1] if not str(path).isprintable() else str(path)


@dataclass(frozen=True, slots=True)
class Mapped:
    """`ids` are class numbers by sub-folder; `how` says what they were found by; `unmatched` stand for no label."""

    ids: Mapping[str, int]
    how: Literal["name", "number", "order"]
    unmatched: Sequence[str]


def map_labels(folders: Sequence[str], labels: Sequence[str]) -> Mapped:
    """Which of `labels` each of `folders` stands for.

    By name, where at least one is a label: exactly, or but for case, spaces, `_` and `-`, or one of several names that
    a label separates by commas. Else, where there are as many folders as labels, by the order of their names, as
    `class_to_idx` of torchvision's `ImageFolder` has them. Else by number, if all of them are numbers of classes.

    Raises:
        InvalidRequest: no folder stands for a label; the message has both names.
    """
    exact = {label: i for i, label in enumerate(labels) if labels.count(label) == 1}
    loose = _unambiguous((_plain(name), i) for i, label in enumerate(labels) for name in (label, *label.split(",")))
    found = {name: i for name in folders if (i := exact.get(name, loose.get(_plain(name)))) is not None}
    if found:
        taken = _unambiguous((i, name) for name, i in found.items())  # two folders for one label: the exact one
        ids = {name: i for name, i in found.items() if name == labels[i] or taken.get(i) == name}
        return Mapped(ids, "name", [name for name in folders if name not in ids])
    if len(folders) == len(labels):
        return Mapped({name: i for i, name in enumerate(folders)}, "order", [])
    if all(name.isdecimal() and int(name) < len(labels) for name in folders):
        return Mapped({name: int(name) for name in folders}, "number", [])
    raise InvalidRequest(
        f"none of the {len(folders)} sub-folders ({listed(folders)}) is one of the model's {len(labels)} labels "
        f"({listed(labels)}), and there are not as many; rename the folders to labels, or to class numbers from 0"
    )


def _plain(name: str) -> str:
    return "".join(each for each in name.casefold() if each not in " _-")


def _unambiguous(pairs: Iterable[tuple[K, V]]) -> dict[K, V]:
    values = defaultdict[K, set[V]](set)
    for key, value in pairs:
        values[key].add(value)
    return {key: value for key, (value, *others) in values.items() if not others}


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(map(repr, every[:_LISTED])) + more
