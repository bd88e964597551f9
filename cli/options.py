"""The options that several commands have, named once."""

from typing import Annotated

import typer

Url = Annotated[
    str | None,
    typer.Option(
        envvar="PVTSERVE_URL", metavar="URL", help="Ask the service there; without it the model runs in this process."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="PVTSERVE_API_KEY", metavar="KEY", help="Key for --url, if the service asks for one."),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="VARIANT.TAG, VARIANT.TAG@VERSION, a variant alone, or an alias. The default is PVT_DEFAULT_MODEL.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="PIXELS", help="Model input, 224 or 256x384, multiples of 32; its own size by default."),
]
Concurrency = Annotated[int, typer.Option(metavar="N", min=1, max=1024, help="Requests at the same time, with --url.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]
Pictures = Annotated[
    list[str], typer.Argument(metavar="FILES|DIR|GLOB...", help="Pictures, folders of pictures, or patterns in quotes.")
]
