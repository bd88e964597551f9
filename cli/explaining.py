"""`pvt-serve explain`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import options
from cli.answering import answering
from cli.asked import Asked
from cli.terminal import USAGE, CommandError, print_line, run


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Pictures")(explain)


def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The picture.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PNG", help="The file to write the overlay into.")
    ] = None,
    class_id: Annotated[
        int | None, typer.Option("--class", min=0, help="Class number; the best one by default.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="How opaque the map lies on the picture.", show_default="0.5")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write class, score, logit, bias and map as JSON.")] = False,
    model: options.Model = None,
    size: options.Size = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show where in a picture a class is seen.

    The map is exact: its mean, plus the bias of the class, is what the model answers (the logit). Yellow speaks most
    for the class, dark blue least.

    Example: `pvt-serve explain cat.jpg -o heat.png`
    """
    if output is None and not as_json:
        raise CommandError("name a file for the overlay with -o, or ask for --json", USAGE)
    if not file.is_file():
        raise CommandError(f"{file}: no such file", USAGE)
    asked = Asked(url=url, api_key=api_key, model=model, size=size)
    png, numbers = run(_explain(asked, file, class_id, alpha, png=output is not None, numbers=as_json))
    if output is not None:
        output.write_bytes(png)
    print_line(json.dumps(numbers) if as_json else str(output))


async def _explain(
    asked: Asked, file: Path, class_id: int | None, alpha: float | None, *, png: bool, numbers: bool
) -> tuple[bytes, dict[str, Any]]:
    """The overlay and the numbers, each empty if not asked for."""
    async with answering(asked) as answers:
        overlay = await answers.overlay(file, class_id, alpha) if png else b""
        if not numbers:
            return overlay, {}
        found = await answers.explain(file, class_id)
    names = ("model", "version", "width", "height", "class_id", "label", "score", "logit", "bias")
    return overlay, {"file": str(file), **{name: getattr(found, name) for name in names}, "map": found.map.tolist()}
