"""Arguments and options that several commands share. It imports little: every `--help` does."""

from typing import Annotated

from typer import Argument, Option

from cli import KEY_VARIABLE, URL_VARIABLE, completion

Url = Annotated[
    str | None,
    Option(
        envvar=URL_VARIABLE, metavar="URL", help="Use the service there; without it the model runs in this process."
    ),
]
ServiceUrl = Annotated[
    str | None,
    Option(
        envvar=URL_VARIABLE,
        metavar="URL",
        help="The service; by default the one on this machine at PVT_PORT, for management at PVT_MANAGEMENT_PORT.",
    ),
]
Key = Annotated[
    str | None,
    Option("--key", "--api-key", envvar=KEY_VARIABLE, metavar="KEY", help="Key for --url, if the service needs one."),
]
Model = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="VARIANT.TAG, VARIANT.TAG@VERSION, a variant alone, or an alias. The default is PVT_DEFAULT_MODEL.",
        autocompletion=completion.models,
    ),
]
Name = Annotated[
    str,
    Argument(metavar="MODEL", help="VARIANT.TAG, VARIANT.TAG@VERSION, or an alias.", autocompletion=completion.models),
]
Names = Annotated[
    list[str],
    Argument(
        metavar="MODELS...", help="VARIANT.TAG, VARIANT.TAG@VERSION, or aliases.", autocompletion=completion.models
    ),
]
Size = Annotated[
    str | None, Option(metavar="PIXELS", help="Model input, 224 or 256x384, multiples of 32; its own size by default.")
]
Concurrency = Annotated[int, Option(metavar="N", min=1, max=1024, help="Requests at the same time, with --url.")]
Json = Annotated[bool, Option("--json", help="Write JSON instead of a table.")]
Images = Annotated[
    list[str] | None,
    Argument(
        metavar="[FILES|DIR|GLOB|-]...",
        help="Images, folders of images, patterns in quotes, or - for an image on standard input.",
    ),
]
FilesFrom = Annotated[
    str | None,
    Option(
        "--files-from",
        metavar="FILE|-",
        help="Also the files and folders that this file, or standard input, lists: one a line, or with NUL between.",
    ),
]
Store = Annotated[str | None, Option("--store", metavar="DIR", help="The model store; PVT_MODEL_STORE by default.")]
