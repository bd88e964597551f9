"""The commands for images: `pvt-serve predict`, `embed` and `explain`."""

import asyncio
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Annotated

from rich.progress import BarColumn, MofNCompleteColumn
from typer import Argument, Exit, Option

from cli import options
from cli.options import Connection, connect
from cli.table import FileState, GrowingTable, growing_table
from cli.terminal import SOME_FAILED, USAGE, CommandError, print_line, print_note, progress_bar, reason
from pvt_client import Embedding, Explanation, Prediction, PvtError
from pvt_client.calls import FeaturesOptions, MapOptions, PredictOptions

_Form = Callable[[Path, Prediction | PvtError], Iterator[str]]
_LISTED = 1000  # failed files whose reasons are kept


def predict(
    files: options.Images,
    top_k: Annotated[
        int | None,
        Option(
            "--top-k",
            "-k",
            min=1,
            max=1000,
            help="Classes for each image at the most: 5, or of a multi-label model all that reach their threshold.",
        ),
    ] = None,
    min_score: Annotated[
        float | None, Option(metavar="X", help="Only classes with this score; by default the model's own thresholds.")
    ] = None,
    model: options.Model = None,
    size: options.Size = None,
    json_lines: Annotated[bool, Option("--json", help="Write one JSON object a line, one for each image.")] = False,
    as_csv: Annotated[bool, Option("--csv", help="Write CSV, a row for each class of each image.")] = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    concurrency: options.Concurrency = 8,
) -> None:
    """Classify images.

    Results are printed in the order of the images, each as soon as it is ready. An image that can't be read has its
    reason in place of classes, and the exit code is then 3.

    Examples: `pvt-serve predict cat.jpg`, `pvt-serve predict --csv photos > classes.csv`,
    `pvt-serve predict --url http://localhost:8000 'photos/**/*.png'`
    """
    if json_lines and as_csv:
        raise CommandError("--json and --csv exclude each other", USAGE)
    paths, query = options.image_files(files), PredictOptions(model=model, size=size, top_k=top_k, min_score=min_score)
    form = _json if json_lines else _csv if as_csv else _text
    if as_csv:
        print_line(_csv_line(["file", "rank", "class_id", "label", "score", "error", "unknown"]))

    if asyncio.run(_print_all(connect(url, api_key), paths, query, concurrency, form)):
        raise Exit(SOME_FAILED)


async def _print_all(
    connection: Connection, paths: Iterable[Path], query: PredictOptions, concurrency: int, form: _Form
) -> int:
    """Print the result of each image in that form; returns how many have none."""
    failed = 0
    async with connection as inference:
        async for path, result in inference.predict_many(paths, concurrency=concurrency, **query):
            failed += not isinstance(result, Prediction)
            for line in form(path, result):
                print_line(line)
            sys.stdout.flush()
    return failed


def _text(path: Path, result: Prediction | PvtError) -> Iterator[str]:
    if isinstance(result, Prediction):
        form = "{:.4g}" if result.activation == "none" else "{:6.2%}"
        classes = "   ".join(f"{form.format(each.score)} {each.label}" for each in result.classes)
        yield f"{path}  {'unknown   ' if result.unknown else ''}{classes or 'no class'}"
    else:
        yield f"{path}  no result: {reason(result)}"


def _json(path: Path, result: Prediction | PvtError) -> Iterator[str]:
    if isinstance(result, Prediction):
        fields = {"width": result.width, "height": result.height, "model": result.model, "version": result.version}
        unknown = {} if result.unknown is None else {"unknown": result.unknown}
        classes = [each._asdict() for each in result.classes]
        yield json.dumps(
            {"file": str(path), **fields, "activation": result.activation, "predictions": classes, **unknown}
        )
    else:
        yield json.dumps({"file": str(path), "error": reason(result)})


def _csv(path: Path, result: Prediction | PvtError) -> Iterator[str]:
    """A row for each class; one without a class where there is none, or an error."""
    if isinstance(result, Prediction):
        unknown = "" if result.unknown is None else str(result.unknown).lower()
        rows = [[rank, *each] for rank, each in enumerate(result.classes, 1)] or [["", "", "", ""]]
        for row in rows:
            yield _csv_line([path, *row, "", unknown])
    else:
        yield _csv_line([path, "", "", "", "", reason(result), ""])


def _csv_line(values: Sequence[object]) -> str:
    line = StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def embed(
    files: options.Images,
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="A .parquet or .npz file to write.")],
    model: options.Model = None,
    size: options.Size = None,
    normalize: Annotated[bool, Option("--normalize", help="Scale each embedding to length 1.")] = False,
    fresh: Annotated[bool, Option("--fresh", help="Delete what is in the file, and begin anew.")] = False,
    group: Annotated[
        int, Option("--group", metavar="ROWS", min=1, help="Images written at a time: what a crash may cost.")
    ] = 500,
    as_json: Annotated[bool, Option("--json", help="Write the summary as JSON.")] = False,
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
    query = FeaturesOptions(model=model, size=size, normalize=normalize)
    with growing_table(output, group, size=size, normalize=normalize, fresh=fresh) as table:
        try:
            with progress_bar(BarColumn(), MofNCompleteColumn()) as progress:
                task = progress.add_task("", total=total)
                run = _Run(table, lambda: progress.advance(task))
                asyncio.run(run.embed(connect(url, api_key), query, paths, concurrency))
            table.finish()
        except KeyboardInterrupt:
            print_note("pvt-serve: interrupted; what is done is kept, and the same command resumes")
            raise
    run.report(output, as_json=as_json)
    if run.failed:
        raise Exit(SOME_FAILED)


@dataclass
class _Run:
    """Adds embeddings to `table`, and counts; calls `step` for each image."""

    table: GrowingTable
    step: Callable[[], None]
    embedded: int = 0
    skipped: int = 0
    failed: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    reading: dict[Path, FileState] = field(default_factory=dict)
    """The files that are being embedded, as they were before they were read."""

    async def embed(
        self, connection: Connection, query: FeaturesOptions, paths: Iterable[Path], concurrency: int
    ) -> None:
        """Embed those `paths` that are not in the table."""
        todo = self._todo(paths, query["model"])
        first = next(todo, None)
        if first is None:
            return  # nothing to do, so no model is needed
        async with connection as inference:
            async for path, result in inference.embedding_many(chain([first], todo), concurrency=concurrency, **query):
                file = self.reading.pop(path)
                if isinstance(result, Embedding):
                    self._count(is_new=self.table.add(file, result))
                else:
                    self._fail(path, reason(result))

    def _todo(self, paths: Iterable[Path], model: str | None) -> Iterator[Path]:
        # Where the name leaves open whether the table is of that model, the first image shows it, even if it has a row.
        probing = len(self.table) > 0 and not self.table.is_of(model)
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
                    self._count(is_new=False)

    def _count(self, *, is_new: bool) -> None:
        self.embedded += is_new
        self.skipped += not is_new
        self.step()

    def _fail(self, path: Path, message: str) -> None:
        self.failed += 1
        if len(self.reasons) < _LISTED:
            self.reasons.append((ascii(str(path))[1:-1], message))
        self.step()

    def report(self, output: Path, *, as_json: bool) -> None:
        """Print the counts, and the failed files with their reasons."""
        rows = len(self.table)
        if as_json:
            errors = [{"file": path, "error": message} for path, message in self.reasons]
            counts = {"rows": rows, "embedded": self.embedded, "skipped": self.skipped, "bad": self.failed}
            print_line(json.dumps({"output": str(output), **counts, "errors": errors}))
            return
        if self.failed:
            print_note(f"{self.failed} could not be embedded:")
            for path, message in self.reasons:
                print_note(f"  {path}: {message}")
            if self.failed > len(self.reasons):
                print_note(f"  and {self.failed - len(self.reasons)} more")
        print_line(f"{output}: {rows} rows, {self.embedded} of them new, {self.skipped} skipped, {self.failed} bad")


def explain(
    file: Annotated[Path, Argument(metavar="FILE", help="The image.")],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="PNG", help="The file to write the overlay into.")
    ] = None,
    class_id: Annotated[int | None, Option("--class", min=0, help="Class number; the best one by default.")] = None,
    alpha: Annotated[
        float | None, Option(min=0, max=1, help="How opaque the map lies on the image.", show_default="0.5")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Write class, score, logit, bias and map as JSON.")] = False,
    model: options.Model = None,
    size: options.Size = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show where in an image the model sees a class.

    The map is exact: its mean, plus the bias of the class, is the logit of the class. Yellow speaks most for the class,
    dark blue least.

    Example: `pvt-serve explain cat.jpg -o heat.png`
    """
    if output is None and not as_json:
        raise CommandError("name a file for the overlay with -o, or request --json", USAGE)
    if not file.is_file():
        raise CommandError(f"{file}: no such file", USAGE)
    query = MapOptions(model=model, size=size, class_id=class_id)
    png, found = asyncio.run(
        _explained(file, connect(url, api_key), query, alpha, png=output is not None, map_=as_json)
    )
    if output is not None:
        output.write_bytes(png)
    if found is None:
        print_line(str(output))
        return
    names = ("model", "version", "width", "height", "class_id", "label", "score", "logit", "bias")
    numbers = {name: getattr(found, name) for name in names}
    print_line(json.dumps({"file": str(file), **numbers, "map": found.map.tolist()}))


async def _explained(
    file: Path, connection: Connection, query: MapOptions, alpha: float | None, *, png: bool, map_: bool
) -> tuple[bytes, Explanation | None]:
    """The overlay and the map, as far as they are requested."""
    async with connection as inference:
        overlay = await inference.explain(file, alpha=alpha, **query) if png else b""
        return overlay, await inference.explain_map(file, **query) if map_ else None
