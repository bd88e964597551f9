"""A model's labels, thresholds and activation, from the files and words in which training scripts leave them."""

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from service.acquisition.catalogue import IMAGENET, imagenet_labels
from service.errors import InvalidRequest
from service.files import read_small
from service.store.cards import Activation

_MAX_BYTES = 16_000_000  # the names of 21,000 classes take one
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
_DELIMITERS = ",;\t"
_TABLES = {".csv", ".tsv"}
# In the objects that libraries write: transformers and its `config.json`, timm, torchvision.
_KEYS = ("id2label", "label_names", "class_to_idx", "label2id", "labels", "classes")
_NAME_COLUMNS = {"label", "labels", "name", "names", "class", "classes", "class_name", "label_name", "category"}
_INDEX_COLUMNS = {"", "#", "index", "idx", "id", "class_id", "class_idx", "class_index", "label_id", "number"}


def read_labels(name: str) -> tuple[str, ...]:
    """The labels that `name` stands for: those of ImageNet-1k, of the folders in a folder, or in a file.

    A file has a label on each line; or it is JSON, a list or an object as `labels_in` reads it; or a table (.csv, .tsv)
    of names, or of names and class numbers. Blank lines do not count.

    Raises:
        InvalidRequest: it can't be read, or does not name each class once; the message says what is wrong.
    """
    if name == IMAGENET:
        return imagenet_labels()
    path = Path(name)
    try:
        if path.is_dir():
            return _folder_names(path)
        text = _text(path)
        if path.suffix.lower() == ".json":
            return labels_in(json.loads(text, object_pairs_hook=_without_repetition))
        lines = tuple(line.strip() for line in text.split("\n") if line.strip())
        labels = _labels_in_table(_rows(text)) if path.suffix.lower() in _TABLES else lines
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"labels {name!r}: {_reason(error)}") from error
    if not labels:
        raise InvalidRequest(f"labels {name!r}: the file is empty; it has the name of each class on a line of its own")
    return labels


def labels_in(content: object) -> tuple[str, ...]:
    """The labels in parsed JSON: a list of them, an object by class number, or one of class numbers by label.

    Such an object may lie under `id2label`, `class_to_idx` and the like, as in a `config.json` of transformers. Raises
    ValueError, which says what is wrong.
    """
    if isinstance(content, dict):
        content = next((inner for key in _KEYS if isinstance(inner := content.get(key), dict | list)), content)
    if isinstance(content, list):
        pairs: Iterable[tuple[object, object]] = enumerate(content)
    elif isinstance(content, dict) and all(isinstance(value, int) for value in content.values()):
        pairs = ((number, label) for label, number in content.items())
    elif isinstance(content, dict) and all(map(_NUMBER.fullmatch, content)):
        pairs = content.items()
    else:
        pairs = ()
    labels = _in_order((int(str(number)), label) for number, label in pairs)
    if not labels:
        raise ValueError(
            "neither a JSON list of names, nor an object with a name for each number (id2label) or a number for each "
            "name (class_to_idx)"
        )
    if wrong := next((i for i, each in enumerate(labels) if not isinstance(each, str | int) or each == ""), None):
        raise ValueError(f"the label of class {wrong} is {labels[wrong]!r}, not a name")
    return tuple(str(each).strip() for each in labels)


def repeated(labels: Sequence[str]) -> str | None:
    """A sentence about the first label that names several classes; None where each has its own."""
    first: dict[str, int] = {}
    for i, label in enumerate(labels):
        if (other := first.setdefault(label, i)) != i:
            return f"classes {other} and {i} are both called {label!r}; tell them by class_id"
    return None


def read_thresholds(given: str, labels: Sequence[str] | None) -> float | tuple[float, ...]:
    """One threshold for all classes, where `given` is a number, or one for each, in a file of that name.

    The file has a number on each line in the order of the classes, or is a table of labels or class numbers and
    thresholds (.csv, .tsv), or JSON: a list of numbers, or an object of numbers by label or class number.

    Raises:
        InvalidRequest: it can't be read, or has not a threshold for each of `labels`, where these are known.
    """
    try:
        return float(given)
    except ValueError:
        path = Path(given)
    try:
        text = _text(path)
        if path.suffix.lower() == ".json":
            content = json.loads(text, object_pairs_hook=_without_repetition)
        elif path.suffix.lower() in _TABLES:
            content = _thresholds_in_table(_rows(text))
        else:
            content = text.split()
        return _numbers(_by_class(content, labels) if isinstance(content, dict) else content)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"thresholds {given!r}: {_reason(error)}") from error


def activation_of(problem_type: str | None, classes: int) -> Activation:
    """The activation that transformers' image classification pipeline applies to the logits of so many `classes`.

    `problem_type` is that of a model's `config.json`.
    """
    if problem_type == "regression":
        return "none"
    return "sigmoid" if problem_type == "multi_label_classification" or classes == 1 else "softmax"


def _folder_names(folder: Path) -> tuple[str, ...]:
    """The names of the folders in `folder`, in the order in which torchvision's `ImageFolder` numbers its classes."""
    names = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not names:
        raise ValueError("no folder is in this folder; it has one for each class, as torchvision's ImageFolder has")
    return names


def _text(path: Path) -> str:
    """What is in the file, without a byte order mark and with line feeds between lines."""
    text = read_small(path, _MAX_BYTES, "file of labels").decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.start}); save it as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON: {error}"
    return str(getattr(error, "strerror", None) or error)


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, in which the last of several values would win without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is in it twice")
    return found


def _in_order(pairs: Iterable[tuple[int, object]]) -> tuple[object, ...]:
    """What belongs to the classes 0, 1, ...; raises ValueError if one is missing or there twice."""
    found: dict[int, object] = {}
    for number, each in pairs:
        if number in found:
            raise ValueError(f"class {number} is there twice, as {found[number]!r} and as {each!r}")
        found[number] = each
    if missing := [i for i in range(len(found)) if i not in found]:
        last = len(found) - 1
        raise ValueError(f"class {missing[0]} is missing: {last + 1} classes are numbered from 0 to {last}")
    return tuple(found[i] for i in range(len(found)))


def _rows(text: str) -> list[list[str]]:
    """The rows of a table, without blank ones; raises ValueError where they differ in length."""
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.split("\n"), delimiter=delimiter)]
    except csv.Error as error:
        raise ValueError(f"it is no table: {error}") from error
    rows = [row for row in rows if any(row)]
    if odd := [row for row in rows if len(row) != len(rows[0])]:
        raise ValueError(f"the row {delimiter.join(odd[0])!r} has {len(odd[0])} columns, the first {len(rows[0])}")
    return rows


def _labels_in_table(rows: list[list[str]]) -> tuple[str, ...]:
    """The names in a table; of several columns one has the numbers of the classes, which tell it from the others."""
    if not rows or len(rows[0]) == 1:
        return tuple(row[0] for i, row in enumerate(rows) if i or row[0].lower() not in _NAME_COLUMNS)
    columns = range(len(rows[0]))
    numbered = [c for c in columns if all(_NUMBER.fullmatch(row[c]) for row in rows[1:])]
    if not numbered or len(rows) == 1:
        raise ValueError("no column has the numbers of the classes; a table has them, or names alone")
    words = [cell.lower() for cell in rows[0]]
    whole = [c for c in numbered if {int(row[c]) for row in rows[1:]} | {0} >= {*range(len(rows) - 1)}]
    index = next((c for c in whole if words[c] in _INDEX_COLUMNS), (whole or numbered)[0])
    body = rows if _NUMBER.fullmatch(rows[0][index]) else rows[1:]
    named = [c for c in columns if c != index]
    name = next((c for c in named if body is not rows and words[c] in _NAME_COLUMNS), named[0])
    labels = _in_order((int(row[index]), row[name]) for row in body)
    if "" in labels:
        raise ValueError(f"class {labels.index('')} has no name")
    return tuple(map(str, labels))


def _thresholds_in_table(rows: list[list[str]]) -> object:
    """Numbers by label, or a list of them; a first row without a number is the names of the columns."""
    if rows and not _is_number(rows[0][-1]):
        rows = rows[1:]
    if rows and len(rows[0]) == 1:
        return [row[0] for row in rows]
    return _without_repetition([(row[0], row[-1]) for row in rows])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(content: object) -> tuple[float, ...]:
    if isinstance(content, list) and content and all(isinstance(each, str | int | float) for each in content):
        return tuple(map(float, content))
    raise ValueError("neither a number for each class nor one for each label")


def _by_class(content: Mapping[str, object], labels: Sequence[str] | None) -> list[object]:
    """The values of `content`, whose keys are labels or class numbers, in the order of the classes."""
    if labels is not None and {*content} == {*labels}:
        return [content[label] for label in labels]
    if all(map(_NUMBER.fullmatch, content)):
        return [*_in_order((int(key), value) for key, value in content.items())]
    if labels is None:
        raise ValueError("it has thresholds by label; give --labels too")
    lacking = [label for label in labels if label not in content]
    unknown = [key for key in content if key not in labels]
    raise ValueError(f"no threshold for {lacking[0]!r}" if lacking else f"there is no class {unknown[0]!r}")
