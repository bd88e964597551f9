"""Arguments and options that several commands share, and what they name: images, a service, the model store."""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from glob import has_magic, iglob  # pathlib's own takes no absolute patterns
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from app.settings import Settings
from cli.terminal import USAGE, CommandError, print_note
from pvt_client.async_client import AsyncCalls, AsyncClient
from service.labelled.folder import IMAGE_SUFFIXES
from service.store.location import without_secrets

Url = Annotated[
    str | None,
    Option(
        envvar="PVTSERVE_URL", metavar="URL", help="Use the service there; without it the model runs in this process."
    ),
]
ApiKey = Annotated[
    str | None, Option(envvar="PVTSERVE_API_KEY", metavar="KEY", help="Key for --url, if the service requires one.")
]
Model = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="VARIANT.TAG, VARIANT.TAG@VERSION, a variant alone, or an alias. The default is PVT_DEFAULT_MODEL.",
    ),
]
Size = Annotated[
    str | None, Option(metavar="PIXELS", help="Model input, 224 or 256x384, multiples of 32; its own size by default.")
]
Concurrency = Annotated[int, Option(metavar="N", min=1, max=1024, help="Requests at the same time, with --url.")]
Json = Annotated[bool, Option("--json", help="Write JSON instead of a table.")]
Images = Annotated[
    list[str], Argument(metavar="FILES|DIR|GLOB...", help="Images, folders of images, or patterns in quotes.")
]
Store = Annotated[str | None, Option("--store", metavar="DIR", help="The model store; PVT_MODEL_STORE by default.")]

Connection = AbstractAsyncContextManager[AsyncCalls]
TIMEOUT_SECONDS = 600.0


@asynccontextmanager
async def connect(url: str | None, api_key: str | None) -> AsyncIterator[AsyncCalls]:
    """The service at `url`, or without one an engine in this process, for as long as the context lasts."""
    if url is not None:
        async with AsyncClient(url, api_key=api_key, timeout=TIMEOUT_SECONDS) as client:
            yield client
        return
    from cli.local import local_engine  # noqa: PLC0415  imports torch, which --url and --help do not need

    async with local_engine(Settings.from_environment()) as engine:
        yield engine


def store_folder(option: str | None, *, write: bool = False) -> Path:
    """The folder that --store names, or else PVT_MODEL_STORE.

    By default that may be the store of the package, which is read only. `write` then returns the user's own store, and
    makes it first.

    Raises:
        CommandError: it is a URL.
        StoreNotWritable: the user's own store can't be made.
    """
    if option:
        return _checked(option)
    settings = Settings.from_environment()
    if settings.remote_store:
        return _checked(settings.remote_store.url)
    if not write:
        return settings.store_folder
    root, is_new = settings.writable_store()
    if is_new:
        print_note(f"pvt-serve: {root} is new, with a copy of the embedded model")
    return root


def _checked(store: str) -> Path:
    if "://" in store:
        raise CommandError(
            f"{without_secrets(store)}: this command works on a store in a folder; name one with --store", USAGE
        )
    return Path(store)


def image_files(arguments: Sequence[str]) -> Iterator[Path]:
    """The images in their order: files as named, those of a folder sorted by name, without hidden ones.

    Raises:
        CommandError: an argument names nothing; it is raised before the first image.
    """
    for argument in arguments:
        if next(_expanded(argument), None) is None:
            folder = f"no images in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})"
            raise CommandError(f"{argument}: {folder if Path(argument).is_dir() else 'no such file'}", USAGE)
    return (path for argument in arguments for path in _expanded(argument))


def _expanded(argument: str) -> Iterator[Path]:
    if Path(argument).is_dir():
        for parent, folders, names in os.walk(argument):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                    yield Path(parent, name)
    elif Path(argument).exists():
        yield Path(argument)
    elif has_magic(argument):
        yield from (Path(each) for each in sorted(iglob(argument, recursive=True)) if Path(each).is_file())  # noqa: PTH207
