"""`pvt-serve models`."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cli import options
from cli.answering import answering
from cli.asked import Asked
from cli.terminal import print_line, run

_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "model": lambda model: model["id"] + (" (default)" if model["default"] else ""),
    "version": lambda model: model["version"],
    "state": lambda model: model["state"],
    "classes": lambda model: _shown(model.get("num_classes")),
    "input": lambda model: "x".join(map(str, model.get("input_size", ()))),
    "parameters": lambda model: _shown(model.get("parameters")),
    "runs on": lambda model: " ".join(filter(None, (model.get("backend"), model.get("precision")))),
    "reason": lambda model: model.get("reason", ""),
}


_WIDE = 250  # characters, where nobody has to look at it


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Models")(models)


def models(as_json: options.Json = False, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """List the models of the store, or of a service.

    Whether a model is in memory, and how it runs there, only a service can tell: give --url. What could be
    pulled is left out of the table; `pvt-serve ls --all` has it.
    """
    found = run(_models(Asked(url=url, api_key=api_key)))
    if as_json:
        print_line(json.dumps({"models": found}, indent=2))
        return
    found = [model for model in found if model["state"] != "remote"]
    columns = {name: [cell(model) for model in found] for name, cell in _COLUMNS.items()}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, cells in columns.items():
        if any(cells) or name == "model":
            table.add_column(name, justify="right" if name in {"classes", "parameters"} else "left", overflow="fold")
    for row in zip(*(cells for name, cells in columns.items() if any(cells) or name == "model"), strict=True):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


async def _models(asked: Asked) -> list[dict[str, Any]]:
    async with answering(asked) as answers:
        return await answers.models()


def _shown(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
