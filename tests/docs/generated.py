"""The tables of the pages that are made from the code: `python -m tests.docs.generated` renews them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from app.settings import Settings

ROOT = Path(__file__).parent.parent.parent
DECISIONS = ROOT / "docs" / "decisions"
DECISION = re.compile(r"^## (Decision (\d+): (.+))$", re.MULTILINE)
_SPECIAL = {
    "device": "`auto`, `cpu`, `cuda`, or GPUs separated by commas: `cuda:0,cuda:1`",
    "mirror": "URL, `http://` or `https://`",
    "model_store": "folder, or URL",
    "cache_dir": "folder, or empty",
}


def settings_table() -> str:
    """Every setting with its default, its values, and its docstring."""
    rows = [
        f"| `PVT_{name.upper()}` | {_default(field)} | {_SPECIAL.get(name) or _values(field)} | "
        f"{' '.join((field.description or '').split())} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | values | meaning |", "|---|---|---|---|", *rows])


def decisions_table() -> str:
    """Every decision by its number, with a link to its text."""
    found = {
        int(number): (path.name, title, text)
        for path in sorted(DECISIONS.glob("*.md"))
        for title, number, text in DECISION.findall(path.read_text())
    }
    rows = [f"| {n} | [{found[n][2]}]({found[n][0]}#{slug(found[n][1])}) |" for n in sorted(found)]
    return "\n".join(["| | decision |", "|---|---|", *rows])


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


def renewed(text: str, make: Callable[[], str]) -> str:
    """`text` with the part between its two marks made anew."""
    begin, end = f"<!-- {make.__name__}: made by tests/docs/generated.py -->", f"<!-- end of {make.__name__} -->"
    before, _, rest = text.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"no marks of {make.__name__}")
    return f"{before}{begin}\n\n{make()}\n\n{end}{after}"


PAGES: Mapping[Path, Callable[[], str]] = {
    ROOT / "docs" / "settings.md": settings_table,
    DECISIONS / "index.md": decisions_table,
}


def _default(field: FieldInfo) -> str:
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    text = str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{text}`" if text else ""


def _values(field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return "secrets, separated by commas" if SecretStr in get_args(kind) else "list, separated by commas"
    if kind is bool:
        return "`true`, `false`"
    if kind in (int, float):
        return _range(field.metadata)
    return "folder" if kind is Path else _union(kind)


def _union(kind: Any) -> str:
    return "folder" if get_origin(kind) in (Union, UnionType) and Path in get_args(kind) else "text"


def _range(bounds: list[object]) -> str:
    low = [f"{bound.ge:,}" for bound in bounds if isinstance(bound, Ge)]
    above = [f"above {bound.gt}" for bound in bounds if isinstance(bound, Gt)]
    high = [f"{bound.le:,}" for bound in bounds if isinstance(bound, Le)]
    if low and high:
        return f"{low[0]} to {high[0]}"
    return ", ".join([*(f"{each} or more" for each in low), *above, *(f"up to {each}" for each in high)])


if __name__ == "__main__":
    for page, make in PAGES.items():
        page.write_text(renewed(page.read_text(), make))
