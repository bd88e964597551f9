"""Tables, against the width that rich's own counter of columns gives."""

from collections.abc import Sequence

import pytest
from rich.cells import cell_len

from cli.table import Column, table_lines

Row = tuple[str, str, str, str]
COLUMNS: Sequence[Column[Row]] = (
    Column("model", lambda row: row[0]),
    Column("state", lambda row: row[1]),
    Column("number", lambda row: row[2], drop=1, right=True),
    Column("from", lambda row: row[3], drop=2),
)
ROWS: Sequence[Row] = (
    ("pvt_v2_b0.short", "available", "7", "https://example.org/somewhere"),
    ("pvt_v2_b2_li.a_name_that_somebody_made_rather_long", "failed", "12,345", "here"),
    ("pvt_v2_b1.犬と猫", "ready", "", ""),
)


@pytest.mark.parametrize("width", [30, 40, 60, 70, 80, 100, 200])
def test_no_line_is_too_wide_but_a_name_and_no_name_is_cut(width: int) -> None:
    lines = table_lines(COLUMNS, ROWS, width)

    names = {row[0] for row in ROWS}
    assert all(cell_len(line) <= width or line in names for line in lines)
    assert all(any(line.startswith(name) for line in lines) for name in names)
    assert all(state in "\n".join(lines) for _, state, *_ in ROWS)


def test_columns_go_by_their_order_and_numbers_stand_at_the_right() -> None:
    widest, narrower = table_lines(COLUMNS, ROWS[:1], 200), table_lines(COLUMNS, ROWS[:1], 40)

    assert widest == [
        "model            state      number  from",
        "pvt_v2_b0.short  available       7  https://example.org/somewhere",
    ]
    assert narrower == ["model            state      number", "pvt_v2_b0.short  available       7"]


def test_without_a_limit_each_row_is_one_line_of_aligned_columns() -> None:
    lines = table_lines(COLUMNS, ROWS, None, lambda row: "a reason" if row[1] == "failed" else "")

    assert len(lines) == 1 + len(ROWS)
    assert lines[2].endswith("  here                           a reason")
    assert len({cell_len(line.partition(row[1])[0]) for line, row in zip(lines[1:], ROWS, strict=True)}) == 1


def test_a_note_that_does_not_fit_stands_below_its_row_in_whole_words() -> None:
    note = "weights.safetensors: 12 bytes, the card says 3,000,000; copy the file again"
    lines = table_lines(COLUMNS, ROWS[:1], 50, lambda _: note)

    assert lines[2:] == [
        "  weights.safetensors: 12 bytes, the card says",
        "  3,000,000; copy the file again",
    ]


def test_what_would_move_the_cursor_is_escaped() -> None:
    (_, line) = table_lines(COLUMNS[:2], [("a\x1b[2Jb", "x\ny", "", "")], 80)

    assert line == "a\\x1b[2Jb  x\\ny"


def test_nothing_is_no_table() -> None:
    assert table_lines(COLUMNS, [], 80) == []
