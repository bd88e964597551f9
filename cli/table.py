"""Tables of plain text, aligned by blanks: nothing else decorates them, so other programs can read them."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shutil import get_terminal_size
from textwrap import wrap
from typing import Generic, TypeVar

from rich.cells import cell_len

from cli.terminal import print_line, printable

T = TypeVar("T")
_GAP = "  "
_NARROW = 20  # least columns for text that is wrapped


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """`text` of a row under `title`. Where a table is too wide, the column with the highest `drop` is left out first.

    Columns with `drop` 0 always stay.
    """

    title: str
    text: Callable[[T], str]
    drop: int = 0
    right: bool = False
    """Whether it is aligned to the right, as numbers are."""


def line_width() -> int | None:
    """The columns of COLUMNS, else of the terminal; None for no limit, where standard output is none."""
    if os.environ.get("COLUMNS", "").isdecimal() or sys.stdout.isatty():
        return get_terminal_size().columns
    return None


def print_table(
    columns: Sequence[Column[T]], rows: Sequence[T], *, hide_empty: bool = False, note: Callable[[T], str] | None = None
) -> None:
    """Print the `table_lines`, in as many columns as `line_width` says; `hide_empty` omits those empty in each row."""
    shown = [each for each in columns if not hide_empty or any(each.text(row) for row in rows)]
    for line in table_lines(shown, rows, line_width(), note or (lambda _: "")):
        print_line(line)


def table_lines(
    columns: Sequence[Column[T]], rows: Sequence[T], width: int | None, note: Callable[[T], str] = lambda _: ""
) -> list[str]:
    """`rows` under the titles of `columns`, in at most `width` columns, None for no limit; nothing without rows.

    `note` is a last column; where that does not fit, its text stands below the row. No text is cut: a first column that
    is too long has a line of its own.
    """
    if not rows:
        return []
    whole, shown = [*columns, Column("", note)], [*columns]
    if width is None or _width(whole, rows) <= width:
        return list(_lines(whole, rows, None, lambda _: ""))
    while _width(shown, rows) > width and any(each.drop for each in shown):
        shown.remove(max(shown, key=lambda each: each.drop))
    return list(_lines(shown, rows, width, note))


def print_fields(fields: Mapping[str, str]) -> None:
    """Print names and values in two columns, without values that are empty; long ones are wrapped as lines are wide."""
    shown = {name: printable(value) for name, value in fields.items() if value}
    indent = " " * (max(map(len, shown), default=0) + len(_GAP))
    width = line_width()
    for name, value in shown.items():
        first, *more = [value] if width is None else _wrapped(value, max(width - len(indent), _NARROW))
        print_line(f"{name:{len(indent)}}{first}")
        for line in more:
            print_line(indent + line)


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, width, break_on_hyphens=False)


def _widths(columns: Sequence[Column[T]], rows: Sequence[T]) -> list[int]:
    return [max([cell_len(each.title), *(cell_len(printable(each.text(row))) for row in rows)]) for each in columns]


def _width(columns: Sequence[Column[T]], rows: Sequence[T]) -> int:
    widths = _widths(columns, rows)
    return sum(widths) + len(_GAP) * (sum(map(bool, widths)) - 1)


def _lines(
    columns: Sequence[Column[T]], rows: Sequence[T], limit: int | None, note: Callable[[T], str]
) -> Iterator[str]:
    widths = _widths(columns, rows)
    if limit and (excess := _width(columns, rows) - limit) > 0:
        widths[0] = max(widths[0] - excess, cell_len(columns[0].title))
    yield _line([each.title for each in columns], columns, widths)
    for row in rows:
        cells = [printable(each.text(row)) for each in columns]
        if cell_len(cells[0]) > widths[0]:
            yield cells[0]
            cells[0] = ""
        yield _line(cells, columns, widths)
        for line in _wrapped(printable(note(row)), max(limit or 0, _NARROW) - len(_GAP)):
            yield _GAP + line


def _line(cells: Sequence[str], columns: Sequence[Column[T]], widths: Sequence[int]) -> str:
    parts = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        blanks = " " * (width - cell_len(cell))
        parts.append(blanks + cell if column.right else cell + blanks)
    return _GAP.join(parts).rstrip()
