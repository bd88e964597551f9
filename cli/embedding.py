"""`pvt-serve embed`."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from cli import options
from cli.answering import answering
from cli.asked import Asked
from cli.blocks import Source
from cli.files import pictures
from cli.made import Made
from cli.parts import GrowingTable
from cli.terminal import SOME_BAD, print_line, reason, run, tell
from pvt_client.answers import Embedding

Step = Callable[[], None]

_LISTED = 1000  # bad files whose reasons are kept


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Pictures")(embed)


@dataclass
class _Tally:
    """How a run went."""

    embedded: int = 0
    skipped: int = 0
    bad: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)

    def refuse(self, path: Path, why: str) -> None:
        """Take note of a bad file."""
        self.bad += 1
        if len(self.reasons) < _LISTED:
            self.reasons.append((ascii(str(path))[1:-1], why))


def embed(
    files: options.Pictures,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .parquet or .npz file to write.")],
    model: options.Model = None,
    size: options.Size = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale each embedding to length 1.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what is in the file, and begin anew.")] = False,
    group: Annotated[
        int, typer.Option("--group", metavar="ROWS", min=1, help="Pictures written at a time: what a crash may cost.")
    ] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Write the summary as JSON.")] = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    concurrency: options.Concurrency = 8,
) -> None:
    """Write the embeddings of pictures into one file.

    A row for each picture: path, width, height, bytes, mtime_ns, model, version, embedding. Run again, it goes on where
    it stopped: pictures that are in the file, and have the same size and time of change, are skipped. Those that can't
    be read are listed at the end, and the exit code is then 3.

    Examples: `pvt-serve embed photos -o photos.parquet`,
    `pvt-serve embed --url http://localhost:8000 --normalize photos -o photos.npz`
    """
    asked = Asked(url=url, api_key=api_key, model=model, size=size, concurrency=concurrency)
    paths, total = pictures(files), sum(1 for _ in pictures(files))
    tally = _Tally()
    with GrowingTable(output, group, fresh=fresh) as table:
        try:
            table.check_asked(size, normalize=normalize)
            with _progress() as progress:
                task = progress.add_task("", total=total)
                run(_embed(asked, paths, table, tally, normalize=normalize, step=lambda: progress.advance(task)))
            table.finish()
        except KeyboardInterrupt:
            tell("pvt-serve: interrupted; what is done is kept, the same command goes on from there")
            raise
        rows = len(table)
    _report(output, tally, rows, as_json=as_json)
    if tally.bad:
        raise typer.Exit(SOME_BAD)


async def _embed(
    asked: Asked, paths: Iterable[Path], table: GrowingTable, tally: _Tally, *, normalize: bool, step: Step
) -> None:
    """Put the embeddings of `paths` that are not in `table` into it; `step` is called for each of `paths`."""
    reading: dict[Path, Source] = {}
    todo = _todo(asked, paths, table, tally, reading, step)
    first = next(todo, None)
    if first is None:
        return  # nothing to do, so no model is needed
    async with answering(asked) as answers:
        async for path, result in answers.embed(chain([first], todo), normalize=normalize):
            source = reading.pop(path)
            if isinstance(result, Embedding):
                table.check(Made.of(result, asked.size, normalize=normalize))
                tally.skipped += source in table
                tally.embedded += source not in table
                if source not in table:
                    table.add(source, result)
            else:
                tally.refuse(path, reason(result))
            step()


def _todo(
    asked: Asked, paths: Iterable[Path], table: GrowingTable, tally: _Tally, reading: dict[Path, Source], step: Step
) -> Iterator[Path]:
    """Those of `paths` that are to be embedded; `reading` takes what they are like now."""
    probing = len(table) > 0 and not table.is_of(asked.model)  # then the first tells, even if it is there
    for path in paths:
        try:
            str(path).encode()  # a column of text takes no other names
            source = Source.of(path)
        except (OSError, UnicodeEncodeError) as error:
            tally.refuse(path, error.strerror or str(error) if isinstance(error, OSError) else "its name is not UTF-8")
        else:
            if (source not in table or probing) and path not in reading:
                probing = False
                reading[path] = source
                yield path
                continue
            tally.skipped += 1
        step()


def _report(output: Path, tally: _Tally, rows: int, *, as_json: bool) -> None:
    if as_json:
        bad = [{"file": path, "error": why} for path, why in tally.reasons]
        counts = {"embedded": tally.embedded, "skipped": tally.skipped, "bad": tally.bad}
        print_line(json.dumps({"output": str(output), "rows": rows, **counts, "errors": bad}))
        return
    if tally.bad:
        tell(f"{tally.bad} could not be embedded:")
        for path, why in tally.reasons:
            tell(f"  {path}: {why}")
        if tally.bad > len(tally.reasons):
            tell(f"  and {tally.bad - len(tally.reasons)} more")
    print_line(f"{output}: {rows} rows, {tally.embedded} of them new, {tally.skipped} skipped, {tally.bad} bad")


def _progress() -> Progress:
    """On a terminal a bar with what is left; else nothing."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
