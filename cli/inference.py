"""What `predict` and `explain` do: requests to a service, or to an engine in this process, and their results."""

import csv
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from io import StringIO
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from cli.checks import class_of_label
from cli.environment import TIMEOUT_SECONDS, settings
from cli.inputs import Images, Source
from cli.terminal import CommandError, print_line, printable, progress_bar, reason
from pvt_client import Explanation, Prediction, PvtError
from pvt_client.async_client import AsyncCalls, AsyncClient
from pvt_client.calls import MapOptions, PredictOptions
from service.files import atomic_write

Form = Callable[[Source, Prediction | PvtError], Iterator[str]]
_CSV_COLUMNS = ("file", "rank", "class_id", "label", "score", "error", "unknown")


@asynccontextmanager
async def connect(url: str | None, key: str | None) -> AsyncIterator[AsyncCalls]:
    """The service at `url`, or without one an engine in this process, for as long as the context lasts."""
    if url is not None:
        async with AsyncClient(url, api_key=key, timeout=TIMEOUT_SECONDS) as client:
            yield client
        return
    from cli.local import local_engine  # imports torch

    async with local_engine(settings()) as engine:
        yield engine


async def print_all(
    url: str | None, key: str | None, images: Images, query: PredictOptions, concurrency: int, form: Form
) -> int:
    """Print the result of each image in that form; returns how many have none.

    A spinner shows that the model is being loaded. A bar follows, unless results on the terminal show what is done.
    """
    failed = 0
    if form is csv_lines:
        print_line(csv_line(_CSV_COLUMNS))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with progress_bar(*columns, transient=True) as progress:
        shown = not progress.disable
        task = progress.add_task(waiting_for(query["model"], url), total=images.count() if shown else None)
        async with connect(url, key) as inference:
            async for image, result in inference.predict_many(images, concurrency=concurrency, **query):
                if sys.stdout.isatty():
                    progress.stop()
                progress.update(task, advance=1, description="")
                failed += not isinstance(result, Prediction)
                for line in form(image, result):
                    print_line(line)
                sys.stdout.flush()
    return failed


def waiting_for(model: str | None, url: str | None) -> str:
    """What a command waits for, before the first result."""
    return f"loading {model or 'the model'}" if url is None else "waiting for the service"


def text_line(image: Source, result: Prediction | PvtError) -> Iterator[str]:
    """For people: the name, then scores and labels."""
    name = printable(str(image))
    if isinstance(result, Prediction):
        form = "{:.4g}" if result.activation == "none" else "{:6.2%}"
        classes = "   ".join(f"{form.format(each.score)} {each.label}" for each in result.classes)
        yield f"{name}  {'unknown   ' if result.unknown else ''}{classes or 'no class'}"
    else:
        yield f"{name}  no result: {reason(result)}"


def json_line(image: Source, result: Prediction | PvtError) -> Iterator[str]:
    """A JSON object."""
    if isinstance(result, Prediction):
        fields = {"width": result.width, "height": result.height, "model": result.model, "version": result.version}
        unknown = {} if result.unknown is None else {"unknown": result.unknown}
        classes = [each._asdict() for each in result.classes]
        yield json.dumps(
            {"file": str(image), **fields, "activation": result.activation, "predictions": classes, **unknown}
        )
    else:
        yield json.dumps({"file": str(image), "error": reason(result)})


def csv_lines(image: Source, result: Prediction | PvtError) -> Iterator[str]:
    """A row for each class; one without a class where there is none, or an error."""
    if isinstance(result, Prediction):
        unknown = "" if result.unknown is None else str(result.unknown).lower()
        rows = [[rank, *each] for rank, each in enumerate(result.classes, 1)] or [["", "", "", ""]]
        for row in rows:
            yield csv_line([image, *row, "", unknown])
    else:
        yield csv_line([image, "", "", "", "", reason(result), ""])


def csv_line(values: Sequence[object]) -> str:
    """A row of CSV without the end of the line."""
    line = StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)  # which it quotes in values
    return line.getvalue().removesuffix("\n")


async def explain_image(
    image: Source, url: str | None, key: str | None, query: MapOptions, label: str | None, alpha: float | None, *,
    png: bool, map_: bool,
) -> tuple[bytes, Explanation | None]:  # fmt: skip
    """The overlay and the map, as far as they are requested, of the class with that `label`, if there is one."""
    with progress_bar(TextColumn("{task.description}"), transient=True) as progress:
        progress.add_task(waiting_for(query["model"], url), total=None)
        async with connect(url, key) as inference:
            if label is not None:
                query["class_id"] = await _class_id(inference, query["model"], label)
            data = image if isinstance(image, Path) else image.getvalue()
            overlay = await inference.explain(data, alpha=alpha, **query) if png else b""
            return overlay, await inference.explain_map(data, **query) if map_ else None


async def _class_id(inference: AsyncCalls, model: str | None, label: str) -> int:
    if model is None:
        model = next((each.id for each in await inference.models() if each.default), None)
        if model is None:
            raise CommandError("the service has no default model: name one with --model")
    found = await inference.model(model)
    return class_of_label(label, found.details.get("labels") or (), found.id)


def explanation_json(image: Source, found: Explanation) -> str:
    """The map and its numbers."""
    names = ("model", "version", "width", "height", "class_id", "label", "score", "logit", "bias")
    numbers = {name: getattr(found, name) for name in names}
    return json.dumps({"file": str(image), **numbers, "crop": found.crop, "map": found.map.tolist()})


def write_overlay(png: bytes, target: Path, *, new: bool) -> None:
    """Write it to the file `target`, or to standard output for `-`; `new`: unless there is such a file by now.

    Raises:
        OSError: it can't be written, and `target` is as it was.
    """
    if str(target) == "-":
        sys.stdout.buffer.write(png)
        sys.stdout.flush()
    elif not new:
        atomic_write(target, png)
    else:
        with target.open("xb") as file:
            try:
                file.write(png)
            except OSError:
                with suppress(OSError):
                    target.unlink()
                raise
