"""`pvt-serve predict`."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.answering import answering
from cli.asked import Asked, Bad
from cli.files import pictures
from cli.terminal import SOME_BAD, USAGE, CommandError, print_line, reason, run
from pvt_client import Prediction

Shown = Prediction | Bad
# One picture's result as lines of output.
Format = Callable[[Path, Shown], Iterator[str]]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Pictures")(predict)


def predict(
    files: options.Pictures,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=1000, help="Classes for each picture.")] = 3,
    model: options.Model = None,
    size: options.Size = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Write one JSON object a line, one for each picture.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write CSV, a row for each class of each picture.")] = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    concurrency: options.Concurrency = 8,
) -> None:
    """Classify pictures.

    Results come in the order of the pictures, each as soon as it is there. A picture that can't be read has its reason
    in place of classes, and the exit code is then 3.

    Examples: `pvt-serve predict cat.jpg`, `pvt-serve predict --csv photos > classes.csv`,
    `pvt-serve predict --url http://localhost:8000 'photos/**/*.png'`
    """
    if json_lines and as_csv:
        raise CommandError("--json and --csv exclude each other", USAGE)
    paths = pictures(files)
    asked = Asked(url=url, api_key=api_key, model=model, size=size, concurrency=concurrency)
    shape = _json if json_lines else _csv if as_csv else _table
    if as_csv:
        print_line(_csv_line(["file", "rank", "class_id", "label", "score", "error"]))
    if run(_predict(asked, paths, top_k, shape)):
        raise typer.Exit(SOME_BAD)


async def _predict(asked: Asked, paths: Iterator[Path], top_k: int, shape: Format) -> int:
    """Print what comes; the number of bad pictures."""
    bad = 0
    async with answering(asked) as answers:
        async for path, result in answers.predict(paths, top_k):
            bad += not isinstance(result, Prediction)
            for line in shape(path, result):
                print_line(line)
            sys.stdout.flush()
    return bad


def _table(path: Path, result: Shown) -> Iterator[str]:
    if not isinstance(result, Prediction):
        yield f"{path}  no result: {reason(result)}"
        return
    shown = "   ".join(f"{each.score:6.2%} {each.label}" for each in result.classes)
    yield f"{path}  {shown}"


def _json(path: Path, result: Shown) -> Iterator[str]:
    if not isinstance(result, Prediction):
        yield json.dumps({"file": str(path), "error": reason(result)})
        return
    fields = {"width": result.width, "height": result.height, "model": result.model, "version": result.version}
    yield json.dumps({"file": str(path), **fields, "predictions": [each._asdict() for each in result.classes]})


def _csv(path: Path, result: Shown) -> Iterator[str]:
    if not isinstance(result, Prediction):
        yield _csv_line([path, "", "", "", "", reason(result)])
        return
    for rank, each in enumerate(result.classes, 1):
        yield _csv_line([path, rank, each.class_id, each.label, each.score, ""])


class _Line(list[str]):
    """What a csv writer writes into."""

    write = list.append


def _csv_line(values: Sequence[object]) -> str:
    line = _Line()
    csv.writer(line, lineterminator="").writerow(values)
    return "".join(line)
