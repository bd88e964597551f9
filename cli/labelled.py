"""The commands for labelled images, a folder for each class: `pvt-serve check` and `fit`."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from typer import Argument, Exit, Option

from cli import options
from cli.checks import check_local
from cli.environment import settings, store_folder
from cli.table import Column, print_table
from cli.terminal import SOME_FAILED, print_line, print_note, print_problem, progress_bar
from service.labelled.folder import LabelledFolder, Mapped, Skipped, listed, read_folder

if TYPE_CHECKING:
    from service.engine import Engine
    from service.labelled.checking import Alternative, Checked
    from service.labelled.measures import Confusion
    from service.labelled.publishing import FitResult

T = TypeVar("T")
Step = Callable[[str, int], None]
_WIDTH = 80  # of tables
_LABEL = 24  # characters of a label in them
_ROWS = 20  # lines of a list
_SKIPPED = 1000  # lines of what was left out
_FEW = 10  # images of a class, with which its figures mean little

Folder = Annotated[Path, Argument(metavar="DIR", help="A folder with one sub-folder of images for each class.")]
Seed = Annotated[int, Option(help="Of what is drawn at random; the same one gives the same result.")]


def check(
    model: options.Name,
    folder: Folder,
    sample: Annotated[
        int, Option(min=0, metavar="IMAGES", help="On how many to try other preprocessing; 0 tries none.")
    ] = 400,
    apply: Annotated[
        bool, Option("--apply", help="Where other preprocessing is better, write the model with it as a new version.")
    ] = False,
    seed: Seed = 0,
    store: options.Store = None,
    as_json: Annotated[bool, Option("--json", help="Write everything as one JSON object.")] = False,
) -> None:
    """Measure a model on labelled images, and try other preprocessing.

    Prints the accuracy, figures of each class and what was taken for what, then says whether another way of bringing
    images to the model's input would do better, as it does where a card is not as the training was.

    Example: `pvt-serve check pvt_v2_b2.birds photos/test`
    """
    root = store_folder(store, write=True) if apply else None
    found = read_folder(folder)
    check_local(model, classes=True, store=store)
    from service.labelled.checking import check as check_model  # imports torch

    checked = _on_engine(
        store, root, lambda engine, step: check_model(engine, model, found, sample=sample, seed=seed, step=step)
    )
    better = next((each for each in checked.alternatives if each.better), None)
    written = _applied(root, checked, better) if root and better else None
    if as_json:
        print_line(json.dumps(_check_json(checked, written)))
    else:
        _print_skipped(checked.skipped)
        _print_mapped(checked.mapped, found, checked.confusion.labels)
        _print_confusion(checked.confusion, f"{checked.stored.key} on {folder}")
        _print_alternatives(checked, better, f"pvt-serve check {model} {folder} --apply", written)
    if checked.skipped:
        raise Exit(SOME_FAILED)


def fit(
    folder: Folder,
    model: options.Model = None,
    tag: Annotated[str | None, Option(help="The new model is called VARIANT.TAG, such as pvt_v2_b2.birds.")] = None,
    add: Annotated[
        bool, Option("--add", help="Fit the next version of a fitted model, to its earlier images and those of DIR.")
    ] = False,
    balanced: Annotated[bool, Option("--balanced", help="Weigh classes equally, whatever their numbers.")] = False,
    seed: Seed = 0,
    store: options.Store = None,
    as_json: Annotated[bool, Option("--json", help="Write everything as one JSON object.")] = False,
) -> None:
    """Make a classifier of your own classes from images, without training a backbone.

    The backbone of --model stays as it is; a linear head is fitted to its embeddings and written with it as a model of
    the store. Accuracy, regularisation and temperature come from images that are held out. Needs
    `pip install 'pvt-serve[fit]'`.

    Examples: `pvt-serve fit photos --model pvt_v2_b2 --tag birds`, then
    `pvt-serve fit --add more --model pvt_v2_b2.birds`
    """
    found, root = read_folder(folder), store_folder(store, write=True)
    check_local(model, store=store)
    from service.labelled.publishing import FitOptions  # imports torch
    from service.labelled.publishing import fit as fit_model

    name = model or settings().default_model
    wanted = FitOptions(model=name, tag=tag, add=add, seed=seed, balanced=balanced)
    result = _on_engine(store, root, lambda engine, step: fit_model(engine, root, found, wanted, step))
    if as_json:
        print_line(json.dumps(_fit_json(result)))
    else:
        _print_skipped(result.skipped)
        _print_fit(result)
    if result.skipped:
        raise Exit(SOME_FAILED)


def _on_engine(store: str | None, root: Path | None, work: Callable[["Engine", Step], Awaitable[T]]) -> T:
    """The result of `work` on an engine for that store, under a progress bar."""
    from cli.local import running_engine  # imports torch

    found = settings()
    if folder := root or (store_folder(store) if store else None):
        found = found.model_copy(update={"model_store": folder})
    with progress_bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), transient=True) as progress:
        task = progress.add_task("loading the model", total=None)

        def step(what: str, total: int) -> None:
            if what:
                progress.reset(task, description=what, total=total or None)
            else:
                progress.advance(task)

        async def run() -> T:
            async with running_engine(found) as engine:
                return await work(engine, step)

        return asyncio.run(run())


def _print_skipped(skipped: Sequence[Skipped]) -> None:
    if skipped:
        print_problem(f"{len(skipped)} left out:")
        for each in skipped[:_SKIPPED]:
            print_problem(f"  {each.path}: {each.reason}")
        if len(skipped) > _SKIPPED:
            print_problem(f"  and {len(skipped) - _SKIPPED} more")


def _print_mapped(mapped: Mapped, folder: LabelledFolder, labels: Sequence[str]) -> None:
    how = {
        "name": "by name",
        "number": "by number",
        "order": "by the order of their names, as class_to_idx of ImageFolder: none of them is a label",
    }
    print_line(f"{len(mapped.ids)} of {len(folder.classes)} sub-folders stand for labels, {how[mapped.how]}")
    other = {name: i for name, i in mapped.ids.items() if name != labels[i]}
    if other:
        pairs = [f"{name} is {labels[i]}" for name, i in other.items()]
        more = f"; and {len(pairs) - _ROWS} more" if len(pairs) > _ROWS else ""
        print_line(f"  {'; '.join(pairs[:_ROWS])}{more}")
    if mapped.unmatched:
        print_note(
            f"left out, since no label has their names: {listed(mapped.unmatched)}; rename them to labels, which "
            f"'GET /models/{{id}}' lists ({listed(labels)})"
        )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _print_confusion(table: "Confusion", what: str) -> None:
    """Accuracy, figures of each class, and what was taken for what, in 80 columns."""
    low, high = table.interval
    print_line(
        f"{what}: {table.right} of {table.images} images are right, {table.accuracy:.1%} ({low:.1%} to {high:.1%})"
    )
    seen = (
        sorted(table.seen, key=lambda i: (table.recall(i) is None, table.recall(i) or 0))
        if len(table.seen) > _ROWS
        else table.seen
    )
    print_table(
        [
            Column("class", lambda i: _short(table.labels[i], _LABEL)),
            Column("images", lambda i: str(table.counts[i].sum()), right=True),
            Column("recall", lambda i: _percent(table.recall(i)), right=True),
            Column("precision", lambda i: _percent(table.precision(i)), right=True),
        ],
        seen[:_ROWS],
    )
    if len(seen) > _ROWS:
        print_line(f"the {_ROWS} with the lowest recall; {len(seen) - _ROWS} more are in --json")
    if len(matrix := _matrix(table)) and max(map(len, matrix)) <= _WIDTH:
        print_line("what was taken for what (a row for each class, a column for each answer):")
        for line in matrix:
            print_line(line)
        return
    for mistake in table.mistakes[:_ROWS]:
        truth, answer = (_short(table.labels[i], _LABEL) for i in (mistake.truth, mistake.answer))
        print_line(f"{mistake.images:5} {truth} taken for {answer}")


def _matrix(table: "Confusion") -> list[str]:
    seen = table.seen
    if len(seen) > _ROWS:
        return []
    names = [_short(table.labels[i], _LABEL) for i in seen]
    wide, most = max(map(len, names)), len(str(max(table.counts.max(), len(seen))))
    # Columns have their row's number where names do not fit.
    by_name = wide + (wide + 2) * len(seen) <= _WIDTH
    heads = names if by_name else [f"{n}" for n in range(1, len(seen) + 1)]
    cell = max(most, *map(len, heads)) + 2
    rows = names if by_name else [f"{n:>2} {name:{wide}}" for n, name in enumerate(names, 1)]
    left = max(map(len, rows))
    lines = [" " * left + "".join(f"{head:>{cell}}" for head in heads)]
    return lines + [
        f"{row:{left}}" + "".join(f"{count or '.':>{cell}}" for count in table.counts[i][seen].tolist())
        for row, i in zip(rows, seen, strict=True)
    ]


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _print_alternatives(checked: "Checked", better: "Alternative | None", command: str, written: str | None) -> None:
    tried = checked.alternatives
    if not tried:
        return
    if better is None:
        best = tried[0]
        print_line(
            f"preprocessing: none of {len(tried)} others is better beyond chance; the best, {_changed(best)}, has "
            f"{best.right} of {best.images} right, the card's {best.card_right}"
        )
        return
    print_line(
        f"preprocessing: {_changed(better)} would be better: {better.right} of {better.images} right, "
        f"{_percent(better.right / better.images)}, the card's {better.card_right}, "
        f"{_percent(better.card_right / better.images)}"
    )
    print_line(
        f"  {better.only_there} are right only so, {better.only_card} only as now; chance does that with a probability "
        f"of at most {better.chance:.1g} (McNemar, for {len(tried)} alternatives)"
    )
    if written:
        print_line(f"  {written} is the model with it")
    else:
        print_line(f"  to use it: {command}")
        print_line(f"  or import the checkpoint again with {_flags(better)}")


def _changed(each: "Alternative") -> str:
    """What is other than on the card; of a resize that has no crop, nothing of a crop."""
    cropped = each.preprocessing.resize == "shorter_side_crop"
    return ", ".join(
        f"{field} {value}"
        for field, value in each.changes.items()
        if (field != "crop" or cropped) and value is not None
    )


def _flags(each: "Alternative") -> str:
    """The options of an import that has that preprocessing."""
    pixels, found = each.preprocessing, []
    if pixels.resize == "shorter_side_crop":
        found.append(f"--crop {pixels.crop:g}")
    elif "resize" in each.changes:
        found.append(f"--resize {pixels.resize}")
    for field, value in each.changes.items():
        if isinstance(value, bool):
            found.append(f"--{field}" if value else f"--no-{field}")
        elif field == "fill":
            found += [f"--fill {' '.join(map(str, value))}"] if value else []
        elif field not in {"resize", "crop", "rounding"}:
            found.append(f"--{field} {value}")
    return " ".join(found)


def _applied(root: Path, checked: "Checked", better: "Alternative") -> str:
    from service.acquisition.publishing import publish_prepared  # imports torch

    return publish_prepared(root, checked.stored, better.preprocessing).key


def _confusion_json(table: "Confusion") -> dict[str, Any]:
    low, high = table.interval
    classes = [
        {
            "class_id": i, "label": table.labels[i], "images": int(table.counts[i].sum()), "recall": table.recall(i),
            "precision": table.precision(i),
        }
        for i in table.seen
    ]  # fmt: skip
    confusion = [
        {"label": table.labels[each.truth], "answer": table.labels[each.answer], "images": each.images}
        for each in table.mistakes
    ]
    counts = {"images": table.images, "right": table.right, "accuracy": table.accuracy, "interval": [low, high]}
    return {**counts, "classes": classes, "confusion": confusion}


def _skipped_json(skipped: Sequence[Skipped]) -> list[Mapping[str, str]]:
    return [{"file": each.path, "reason": each.reason} for each in skipped]


def _check_json(checked: "Checked", written: str | None) -> dict[str, Any]:
    labels = checked.confusion.labels
    alternatives = [
        {
            "changes": each.changes, "images": each.images, "right": each.right, "card_right": each.card_right,
            "only_there": each.only_there, "only_card": each.only_card, "chance": each.chance, "better": each.better,
        }
        for each in checked.alternatives
    ]  # fmt: skip
    return {
        "model": checked.stored.id,
        "version": checked.stored.version,
        **_confusion_json(checked.confusion),
        "mapped_by": checked.mapped.how,
        "mapped": {name: labels[i] for name, i in checked.mapped.ids.items()},
        "unmatched": list(checked.mapped.unmatched),
        "skipped": _skipped_json(checked.skipped),
        "alternatives": alternatives,
        "written": written,
    }


def _print_fit(result: "FitResult") -> None:
    fitted, images = result.fitted, sum(result.counts.values())
    if result.known or result.moved:
        print_line(f"{result.known} images were there already, {result.moved} have another class now")
    if fitted.held_out:
        _print_confusion(fitted.held_out, "held out of the fit")
    else:
        print_note("no class has more than one image, so nothing could be held out, and the accuracy is unknown")
    if few := [label for label, count in result.counts.items() if count < _FEW]:
        print_note(f"fewer than {_FEW} images, so these classes are learnt and measured badly: {listed(few)}")
    if max(result.counts.values()) > _FEW * min(result.counts.values()):
        print_note("the largest class has more than ten times the images of the smallest: compare with --balanced")
    print_line(
        f"{result.stored.key}: {len(result.counts)} classes, fitted to all {images} images, C {fitted.strength:g}, "
        f"temperature {fitted.temperature:.2f}"
    )


def _fit_json(result: "FitResult") -> dict[str, Any]:
    fitted = result.fitted
    return {
        "model": result.stored.id,
        "version": result.stored.version,
        "classes": dict(result.counts),
        "strength": fitted.strength,
        "temperature": fitted.temperature,
        "held_out": fitted.held_out and _confusion_json(fitted.held_out),
        "known": result.known,
        "moved": result.moved,
        "skipped": _skipped_json(result.skipped),
    }
