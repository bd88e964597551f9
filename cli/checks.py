"""What can be refused before anything is loaded: models, classes and sizes that do not exist."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from cli.environment import settings, store_folder
from cli.terminal import USAGE, CommandError
from service.errors import WeightsUnavailable
from service.store.cards import ModelCard
from service.store.store import Store

_SIZE = re.compile(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", re.ASCII)
_MULTIPLE = 32  # pixels: the last stage of the pyramid has a 32nd of the input's side
_SHOWN = 8


def sides(size: str, option: str = "--size") -> tuple[int, int]:
    """Height and width of `224` or `256x384`; raises CommandError."""
    match = _SIZE.fullmatch(size)
    if match is None:
        raise CommandError(
            f"{option} {size}: it must be a number of pixels, or height and width such as 256x384", USAGE
        )
    return int(match[1]), int(match[2] or match[1])


def check_size(size: str | None, most: int | None = None) -> None:
    """Raise CommandError where no model can have the input size `size`; `most`: the longest side that is allowed."""
    if size is None:
        return
    for side in sides(size):
        if side % _MULTIPLE:
            below = max(side // _MULTIPLE, 1) * _MULTIPLE
            raise CommandError(f"--size {size}: sides must be multiples of {_MULTIPLE}, such as {below}", USAGE)
        if most is not None and side > most:
            raise CommandError(f"--size {size}: at most {most} pixels, as PVT_MAX_INPUT_SIDE says", USAGE)


def check_local(
    model: str | None,
    size: str | None = None,
    *,
    classes: bool = False,
    min_score: float | None = None,
    store: str | None = None,
) -> ModelCard | None:
    """Check what an engine in this process will be requested; the card of `model`, or of the default model.

    None where only loading tells: of a store by URL, and of weights that are pulled on demand. With `classes` the model
    must name some. `store` is the folder of --store.

    Raises:
        CommandError, ServiceError: the model does not exist or can't be used, or a value is not possible.
    """
    found = settings()
    check_size(size, found.max_input_side)
    if found.remote_store and store is None:
        return None
    try:
        card = Store(store_folder(store)).find(model or found.default_model).require_card()
    except WeightsUnavailable:
        if found.pull == "on_demand":
            return None
        raise
    if classes:
        from service.postprocess import check_classes

        check_classes(card, min_score=min_score)
    return card


def class_number(text: str) -> int | None:
    """The class id that `text` is; None where it is a label."""
    return int(text) if text.isascii() and text.isdecimal() else None


def class_of_label(label: str, labels: Sequence[str], model: str) -> int:
    """The id of the class that `label` names, as a whole or as one of its names between commas, whatever the case.

    Raises:
        CommandError: no class has that name, and the nearest ones are named; or several have it.
    """
    names: dict[str, list[int]] = {}
    for number, each in enumerate(labels):
        for name in {each, *each.split(",")}:
            names.setdefault(name.strip().casefold(), []).append(number)
    wanted = label.strip().casefold()
    exact = [number for number, each in enumerate(labels) if each.casefold() == wanted]
    found = exact or names.get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        which = ", ".join(f"{number} ({labels[number]})" for number in found[:_SHOWN])
        raise CommandError(
            f"--class {label!r}: several classes of {model} are called so; give a number: {which}", USAGE
        )
    near = get_close_matches(wanted, names, n=3) or [name for name in names if wanted and wanted in name][:3]
    hint = "; the nearest are " + ", ".join(repr(labels[names[each][0]]) for each in near) if near else ""
    raise CommandError(
        f"--class {label!r}: no class of {model} is called so{hint}; 'pvt-serve show {model} --labels' lists them",
        USAGE,
    )
