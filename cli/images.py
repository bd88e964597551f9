"""The commands for images: `pvt-serve predict`, `embed` and `explain`."""

import asyncio
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from cli import options
from cli.terminal import SOME_FAILED, USAGE, CommandError, print_line, print_note


def predict(
    files: options.Images = None,
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
    files_from: options.FilesFrom = None,
    url: options.Url = None,
    key: options.Key = None,
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
    from cli.checks import check_local, check_size
    from cli.inputs import images

    if url is None:
        check_local(model, size, classes=True, min_score=min_score)
    check_size(size)
    paths = images(files, files_from)
    from cli.inference import csv_lines, json_line, print_all, text_line
    from pvt_client.calls import PredictOptions

    query = PredictOptions(model=model, size=size, top_k=top_k, min_score=min_score)
    form = json_line if json_lines else csv_lines if as_csv else text_line
    if asyncio.run(print_all(url, key, paths, query, concurrency, form)):
        raise Exit(SOME_FAILED)


def embed(
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="A .parquet or .npz file to write.")],
    files: options.Images = None,
    model: options.Model = None,
    size: options.Size = None,
    normalize: Annotated[bool, Option("--normalize", help="Scale each embedding to length 1.")] = False,
    fresh: Annotated[bool, Option("--fresh", help="Delete what is in the file, and begin anew.")] = False,
    group: Annotated[
        int, Option("--group", metavar="ROWS", min=1, help="Images written at a time: what a crash may cost.")
    ] = 500,
    as_json: Annotated[bool, Option("--json", help="Write the summary as JSON.")] = False,
    files_from: options.FilesFrom = None,
    url: options.Url = None,
    key: options.Key = None,
    concurrency: options.Concurrency = 8,
) -> None:
    """Write the embeddings of images into one file.

    A row for each image: path, width, height, bytes, mtime_ns, model, version, embedding. Run again, it resumes: images
    that are in the file, and have the same size and time of change, are skipped. Those that can't be read are listed at
    the end, and the exit code is then 3.

    Examples: `pvt-serve embed photos -o photos.parquet`,
    `pvt-serve embed --url http://localhost:8000 --normalize photos -o photos.npz`
    """
    from cli.checks import check_local, check_size
    from cli.inputs import images

    if url is None:
        check_local(model, size)
    check_size(size)
    paths = images(files, files_from)
    from cli.embedding import Run
    from cli.embeddings import growing_table
    from pvt_client.calls import FeaturesOptions

    query = FeaturesOptions(model=model, size=size, normalize=normalize)
    with growing_table(output, group, size=size, normalize=normalize, fresh=fresh) as table:
        run = Run(table)
        try:
            run.embed(url, key, paths, query, concurrency)
            table.finish()
        except KeyboardInterrupt:
            print_note("pvt-serve: interrupted; what is done is kept, and the same command resumes")
            raise
    run.report(output, as_json=as_json)
    if run.failed:
        raise Exit(SOME_FAILED)


def explain(
    file: Annotated[str, Argument(metavar="FILE", help="The image; - for standard input.")],
    output: Annotated[
        str | None,
        Option("--output", "-o", metavar="PNG|-", help="The file to write the overlay into; - for standard output."),
    ] = None,
    default_name: Annotated[
        bool,
        Option("-O", help="Write it into FILE-explained.png of the current folder, as without -o, with --json too."),
    ] = False,
    force: Annotated[bool, Option("--force", help="Overwrite FILE-explained.png.")] = False,
    class_: Annotated[
        str | None, Option("--class", metavar="CLASS", help="Its number or its label; the best one by default.")
    ] = None,
    alpha: Annotated[
        float | None, Option(min=0, max=1, help="How opaque the map lies on the image.", show_default="0.5")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Write class, score, logit, bias and map as JSON.")] = False,
    model: options.Model = None,
    size: options.Size = None,
    url: options.Url = None,
    key: options.Key = None,
) -> None:
    """Show where in an image the model sees a class.

    The map is exact: its mean, plus the bias of the class, is the logit of the class. Yellow speaks most for the class,
    dark blue least.

    Examples: `pvt-serve explain cat.jpg -o heat.png`, `pvt-serve explain --class "tiger cat" cat.jpg`
    """
    from cli.checks import check_local, check_size, class_number, class_of_label
    from cli.inputs import one_image

    card = check_local(model, size, classes=True) if url is None else None
    check_size(size)
    class_id = None if class_ is None else class_number(class_)
    if class_ is not None and class_id is None and card:
        class_id = class_of_label(class_, card.labels, card.id)
    if class_id is not None and card and class_id >= len(card.labels):
        raise CommandError(f"--class {class_}: {card.id} has the classes 0 to {len(card.labels) - 1}", USAGE)
    by_name = default_name or (output is None and not as_json)
    target = _target(file, output, by_name=by_name, as_json=as_json, force=force)
    image = one_image(file)
    from cli.inference import explain_image, explanation_json, write_overlay
    from pvt_client.calls import MapOptions

    query = MapOptions(model=model, size=size, class_id=class_id)
    label = class_ if class_id is None else None
    png, found = asyncio.run(explain_image(image, url, key, query, label, alpha, png=target is not None, map_=as_json))
    if target is not None:
        write_overlay(png, target, new=by_name and not force)
    if found is not None:
        print_line(explanation_json(image, found))
    elif target is not None and str(target) != "-":
        print_line(str(target))


def _target(file: str, output: str | None, *, by_name: bool, as_json: bool, force: bool) -> Path | None:
    """Where the overlay is to go, `-` for standard output; None if nowhere."""
    if output is not None and by_name:
        raise CommandError("-o names the file, and -O has a name for it: give one of them", USAGE)
    if output == "-" and as_json:
        raise CommandError("-o - and --json are both for standard output: name a file with -o", USAGE)
    if output == "-":
        import sys

        if sys.stdout.isatty():
            raise CommandError("-o - writes a PNG to standard output, which is a terminal: pipe it somewhere", USAGE)
    target = (
        Path(f"{Path(file).stem if file != '-' else 'stdin'}-explained.png") if by_name else output and Path(output)
    )
    if not target:
        return None
    if by_name and target.exists() and not force:
        raise CommandError(f"{target} exists: --force overwrites it, -o names another file", USAGE)
    if target.is_dir() or not target.parent.is_dir():
        raise CommandError(
            f"{target}: {'a folder' if target.is_dir() else 'there is no such folder'}; name a file", USAGE
        )
    return target
