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
from cli.table import FileState, GrowingTable, growing_table
from cli.table_formats import Provenance
from cli.target import Connection, connect
from cli.terminal import SOME_FAILED, print_line, print_note, reason
from pvt_client import Embedding
from pvt_client.calls import FeaturesOptions

_LISTED = 1000  # failed files whose reasons are kept


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
    paths, total = options.image_files(files), sum(1 for _ in options.image_files(files))
    with growing_table(output, group, fresh=fresh) as table:
        try:
            table.check_options(size, normalize=normalize)
            with _progress() as progress:
                task = progress.add_task("", total=total)
                run = _Run(table, model, size, normalize, lambda: progress.advance(task))
                asyncio.run(run.embed(connect(url, api_key), paths, concurrency))
            table.finish()
        except KeyboardInterrupt:
            print_note("pvt-serve: interrupted; what is done is kept, and the same command resumes")
            raise
        rows = len(table)
    _report(output, run, rows, as_json=as_json)
    if run.failed:
        raise typer.Exit(SOME_FAILED)


@dataclass
class _Run:
    """Adds embeddings to `table`, and counts; calls `step` for each image."""

    table: GrowingTable
    model: str | None
    size: str | None
    normalize: bool
    step: Callable[[], None]
    embedded: int = 0
    skipped: int = 0
    failed: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    reading: dict[Path, FileState] = field(default_factory=dict)
    """The files that are being embedded, as they were before they were read."""

    async def embed(self, connection: Connection, paths: Iterable[Path], concurrency: int) -> None:
        """Embed those `paths` that are not in the table."""
        todo = self._todo(paths)
        first = next(todo, None)
        if first is None:
            return  # nothing to do, so no model is needed
        query = FeaturesOptions(model=self.model, size=self.size, normalize=self.normalize)
        async with connection as inference:
            async for path, result in inference.embedding_many(chain([first], todo), concurrency=concurrency, **query):
                file = self.reading.pop(path)
                if not isinstance(result, Embedding):
                    self._fail(path, reason(result))
                    continue
                self.table.check(Provenance.of(result, self.size, normalize=self.normalize))
                if file in self.table:
                    self.skipped += 1
                else:
                    self.embedded += 1
                    self.table.add(file, result)
                self.step()

    def _todo(self, paths: Iterable[Path]) -> Iterator[Path]:
        # Where the name leaves open whether the table is of that model, the first image shows it, even if it has a row.
        probing = len(self.table) > 0 and not self.table.is_of(self.model)
        for path in paths:
            try:
                str(path).encode()  # a column of text takes no other names
                file = FileState.of(path)
            except UnicodeEncodeError:
                self._fail(path, "its name is not UTF-8")
            except OSError as error:
                self._fail(path, error.strerror or str(error))
            else:
                if (file not in self.table or probing) and path not in self.reading:
                    probing = False
                    self.reading[path] = file
                    yield path
                else:
                    self.skipped += 1
                    self.step()

    def _fail(self, path: Path, message: str) -> None:
        self.failed += 1
        if len(self.reasons) < _LISTED:
            self.reasons.append((ascii(str(path))[1:-1], message))
        self.step()


def _report(output: Path, run: _Run, rows: int, *, as_json: bool) -> None:
    if as_json:
        errors = [{"file": path, "error": message} for path, message in run.reasons]
        counts = {"embedded": run.embedded, "skipped": run.skipped, "bad": run.failed}
        print_line(json.dumps({"output": str(output), "rows": rows, **counts, "errors": errors}))
        return
    if run.failed:
        print_note(f"{run.failed} could not be embedded:")
        for path, message in run.reasons:
            print_note(f"  {path}: {message}")
        if run.failed > len(run.reasons):
            print_note(f"  and {run.failed - len(run.reasons)} more")
    print_line(f"{output}: {rows} rows, {run.embedded} of them new, {run.skipped} skipped, {run.failed} bad")


def _progress() -> Progress:
    """A bar with the time that is left, on a terminal only."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
