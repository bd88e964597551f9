"""`pvt-serve plan export` and `plan import`: replicas that agree on a model's batch plan, and do not measure it."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import ValidationError
from typer import Argument, Option

from cli.environment import settings
from cli.terminal import USAGE, CommandError, print_line
from service.errors import ServiceError, reasons

if TYPE_CHECKING:
    from app.settings import Settings
    from service.execution.plan_cache import PlanCache, PortablePlan


class Action(StrEnum):
    """What to do."""

    EXPORT = "export"
    IMPORT = "import"


def plan(
    action: Annotated[Action, Argument(help="export MODEL, or import FILE.")],
    what: Annotated[str, Argument(metavar="MODEL|FILE", help="A model of the store; or a file that export wrote.")],
    output: Annotated[
        Path | None, Option("--output", "-o", help="Write the plan there; else on standard output.")
    ] = None,
) -> None:
    """Let replicas agree on a model's batch plan: export it, import it.

    A plan is what a model's first load measures: precision, batch sizes, their times, how cores are shared out. export
    loads MODEL with the settings of the environment. import loads the model with the plan in FILE, in place of
    measuring, and keeps it in PVT_CACHE_DIR for every later load. It is refused where weights, card, input, backend,
    instances or cores are not the same, or the processor can't compute in its precision.
    """
    found = settings().model_copy(update={"preload": (), "pinned": ()})
    if action is Action.IMPORT:
        _import(Path(what), found)
        return
    text = asyncio.run(_exported(what, found)).model_dump_json(indent=2)
    if output is None:
        print_line(text)
        return
    try:
        output.write_text(text + "\n")
    except OSError as error:
        raise CommandError(f"{output}: {error.strerror or error}") from error
    print_line(f"{what}: its plan is in {output}")


async def _exported(model: str, found: "Settings") -> "PortablePlan":
    from cli.local import running_engine

    async with running_engine(found) as engine:
        return await engine.portable_plan(model)


def _import(file: Path, found: "Settings") -> None:
    from service.execution.plan_cache import PlanCache, PortablePlan

    if found.cache_folder is None:
        raise CommandError("PVT_CACHE_DIR is empty, and a plan is kept there: name a folder", USAGE)
    try:
        imported = PortablePlan.model_validate_json(file.read_bytes())
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror or error}") from error
    except ValidationError as error:
        raise CommandError(f"{file} is no plan that pvt-serve plan export wrote: {reasons(error)}") from error
    cache, name = PlanCache(found.cache_folder), f"{imported.model}@{imported.version}"
    try:
        refusal = asyncio.run(_loaded_with(imported, name, cache, found))
    except OSError as error:
        raise CommandError(f"{found.cache_folder}: {error.strerror or error}; PVT_CACHE_DIR names it") from error
    if refusal:
        raise CommandError(f"{file} is not for {name} here: {refusal}")
    sizes = ", ".join(map(str, sorted(imported.seconds)))
    print_line(f"{name} computes in {imported.precision}, in batches of {sizes}, as {file} says")


async def _loaded_with(imported: "PortablePlan", name: str, cache: "PlanCache", found: "Settings") -> str:
    """Load the model called `name` with `imported` and keep that; else why it is not used, and all is as before."""
    from cli.local import running_engine
    from service.registry.loader import NOT_PINNED

    try:
        before = cache.pinned(imported.model, imported.version)
    except ValueError:
        before = None
    done = False
    cache.pin(imported.model, imported.version, imported)
    try:
        async with running_engine(found) as engine:
            await engine.load(name)
            status = await engine.model(name)
        done = status.report is not None and status.report.pinned
        notes = [note.removeprefix(f"{NOT_PINNED}: ") for note in status.notes if note.startswith(NOT_PINNED)]
        return "" if done else "; ".join(notes) or "another backend was used"
    except ServiceError as error:
        return str(error)
    finally:
        if not done:
            cache.pin(imported.model, imported.version, before)
