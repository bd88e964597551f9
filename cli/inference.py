"""`pvt-serve predict` and `pvt-serve explain`."""

import asyncio
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import options
from cli.target import Connection, Failure, connect
from cli.terminal import SOME_FAILED, USAGE, CommandError, print_line, reason
from pvt_client import Prediction
from pvt_client.calls import MapOptions, PredictOptions

# The result of one image as lines of output.
Format = Callable[[Path, Prediction | Failure], Iterator[str]]


def predict(
    files: options.Images,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=1000, help="Classes for each image.")] = 3,
    model: options.Model = None,
    size: options.Size = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Write one JSON object a line, one for each image.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write CSV, a row for each class of each image.")] = False,
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
    paths = options.image_files(files)
    query = PredictOptions(model=model, size=size, top_k=top_k)
    form = _json if json_lines else _csv if as_csv else _text
    if as_csv:
        print_line(_csv_line(["file", "rank", "class_id", "label", "score", "error"]))
    if asyncio.run(_predict(connect(url, api_key), paths, query, concurrency, form)):
        raise typer.Exit(SOME_FAILED)


async def _predict(
    connection: Connection, paths: Iterator[Path], query: PredictOptions, concurrency: int, form: Format
) -> int:
    """Print the results; returns the number of images without one."""
    failed = 0
    async with connection as inference:
        async for path, result in inference.predict_many(paths, concurrency=concurrency, **query):
            failed += not isinstance(result, Prediction)
            for line in form(path, result):
                print_line(line)
            sys.stdout.flush()
    return failed


def _text(path: Path, result: Prediction | Failure) -> Iterator[str]:
    if not isinstance(result, Prediction):
        yield f"{path}  no result: {reason(result)}"
        return
    classes = "   ".join(f"{each.score:6.2%} {each.label}" for each in result.classes)
    yield f"{path}  {classes}"


def _json(path: Path, result: Prediction | Failure) -> Iterator[str]:
    if not isinstance(result, Prediction):
        yield json.dumps({"file": str(path), "error": reason(result)})
        return
    fields = {"width": result.width, "height": result.height, "model": result.model, "version": result.version}
    yield json.dumps({"file": str(path), **fields, "predictions": [each._asdict() for each in result.classes]})


def _csv(path: Path, result: Prediction | Failure) -> Iterator[str]:
    if not isinstance(result, Prediction):
        yield _csv_line([path, "", "", "", "", reason(result)])
        return
    for rank, each in enumerate(result.classes, 1):
        yield _csv_line([path, rank, each.class_id, each.label, each.score, ""])


def _csv_line(values: Sequence[object]) -> str:
    line = StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The image.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PNG", help="The file to write the overlay into.")
    ] = None,
    class_id: Annotated[
        int | None, typer.Option("--class", min=0, help="Class number; the best one by default.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="How opaque the map lies on the image.", show_default="0.5")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write class, score, logit, bias and map as JSON.")] = False,
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
    png, numbers = asyncio.run(
        _explain(connect(url, api_key), file, query, alpha, overlay=output is not None, numbers=as_json)
    )
    if output is not None:
        output.write_bytes(png)
    print_line(json.dumps(numbers) if as_json else str(output))


async def _explain(
    connection: Connection, file: Path, query: MapOptions, alpha: float | None, *, overlay: bool, numbers: bool
) -> tuple[bytes, dict[str, Any]]:
    """The PNG if `overlay`, and the numbers if `numbers`; else each is empty."""
    async with connection as inference:
        png = await inference.explain(file, alpha=alpha, **query) if overlay else b""
        if not numbers:
            return png, {}
        found = await inference.explain_map(file, **query)
    names = ("model", "version", "width", "height", "class_id", "label", "score", "logit", "bias")
    return png, {"file": str(file), **{name: getattr(found, name) for name in names}, "map": found.map.tolist()}
