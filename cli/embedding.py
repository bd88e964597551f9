"""`pvt-serve embed`."""

import asyncio
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
from cli.connection import connect
from cli.growing_table import GrowingTable
from cli.rows import FileState, Provenance
from cli.target import Target
from cli.terminal import SOME_FAILED, print_line, print_note, reason
from pvt_client import Embedding

Step = Callable[[], None]

_LISTED = 1000  # failed files whose reasons are kept


@dataclass
class _Tally:
    """The outcome of a run so far."""

    embedded: int = 0
    skipped: int = 0
    failed: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, path: Path, message: str) -> None:
        """Count a file that has no embedding."""
        self.failed += 1
        if len(self.reasons) < _LISTED:
            self.reasons.append((ascii(str(path))[1:-1], message))


def embed(
    files: options.Images,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .parquet or .npz file to write.")],
    model: options.Model = None,
    size: options.Size = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale each embedding to length 1.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is in the file, and begin anew.")] = False,
    group: Annotated[
        int, typer.Option("--group", metavar="ROWS", min=1, help="Images written at a time: what a crash may cost.")
    ] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Write the summary as JSON.")] = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    concurrency: options.Concurrency = 8,
) -> None:
    """Write the embeddings of images into one file.

    A row for each image: path, width, height, bytes, mtime_ns, model, version, embedding. Run again, it resumes: images
    that are in the file, and have the same size and time of change, are skipped. Those that can't be read are listed at
    the end, and the exit code is then 3.

    Examples: `pvt-serve embed photos -o photos.parquet`,
    `pvt-serve embed --url http://localhost:8000 --normalize photos -o photos.npz`
    """
    target = Target(url=url, api_key=api_key, model=model, size=size, concurrency=concurrency)
    paths, total = options.image_files(files), sum(1 for _ in options.image_files(files))
    tally = _Tally()
    with GrowingTable(output, group, fresh=fresh) as table:
        try:
            table.check_options(size, normalize=normalize)
            with _progress() as progress:
                task = progress.add_task("", total=total)
                work = _embed(target, paths, table, tally, normalize=normalize, step=lambda: progress.advance(task))
                asyncio.run(work)
            table.finish()
        except KeyboardInterrupt:
            print_note("pvt-serve: interrupted; what is done is kept, and the same command resumes")
            raise
        rows = len(table)
    _report(output, tally, rows, as_json=as_json)
    if tally.failed:
        raise typer.Exit(SOME_FAILED)


async def _embed(
    target: Target, paths: Iterable[Path], table: GrowingTable, tally: _Tally, *, normalize: bool, step: Step
) -> None:
    """Add the embeddings of those `paths` that are not in `table`; calls `step` for each of `paths`."""
    reading: dict[Path, FileState] = {}
    todo = _todo(target, paths, table, tally, reading, step)
    first = next(todo, None)
    if first is None:
        return  # nothing to do, so no model is needed
    async with connect(target) as inference:
        async for path, result in inference.embed(chain([first], todo), normalize=normalize):
            file = reading.pop(path)
            if not isinstance(result, Embedding):
                tally.fail(path, reason(result))
            else:
                table.check(Provenance.of(result, target.size, normalize=normalize))
                if file in table:
                    tally.skipped += 1
                else:
                    tally.embedded += 1
                    table.add(file, result)
            step()


def _todo(
    target: Target,
    paths: Iterable[Path],
    table: GrowingTable,
    tally: _Tally,
    reading: dict[Path, FileState],
    step: Step,
) -> Iterator[Path]:
    """The `paths` to embed; puts the present state of each into `reading`."""
    # Where the name leaves open whether the table is of that model, the first image shows it, even if it has a row.
    probing = len(table) > 0 and not table.is_of(target.model)
    for path in paths:
        try:
            str(path).encode()  # a column of text takes no other names
            file = FileState.of(path)
        except (OSError, UnicodeEncodeError) as error:
            tally.fail(path, error.strerror or str(error) if isinstance(error, OSError) else "its name is not UTF-8")
        else:
            if (file not in table or probing) and path not in reading:
                probing = False
                reading[path] = file
                yield path
                continue
            tally.skipped += 1
        step()


def _report(output: Path, tally: _Tally, rows: int, *, as_json: bool) -> None:
    if as_json:
        errors = [{"file": path, "error": message} for path, message in tally.reasons]
        counts = {"embedded": tally.embedded, "skipped": tally.skipped, "bad": tally.failed}
        print_line(json.dumps({"output": str(output), "rows": rows, **counts, "errors": errors}))
        return
    if tally.failed:
        print_note(f"{tally.failed} could not be embedded:")
        for path, message in tally.reasons:
            print_note(f"  {path}: {message}")
        if tally.failed > len(tally.reasons):
            print_note(f"  and {tally.failed - len(tally.reasons)} more")
    print_line(f"{output}: {rows} rows, {tally.embedded} of them new, {tally.skipped} skipped, {tally.failed} bad")


def _progress() -> Progress:
    """A bar with the time that is left, on a terminal only."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
