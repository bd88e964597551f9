"""Who answers: a service elsewhere, or the engine in this process. Commands do not know which."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cli.asked import Answering, Asked
from pvt_client import AsyncClient


@asynccontextmanager
async def answering(asked: Asked) -> AsyncIterator[Answering]:
    """Whoever `asked` means, for as long as the context lasts."""
    if asked.url is None:
        from cli.here import engine_here  # noqa: PLC0415  with it comes torch, which --url and --help do not need

        async with engine_here(asked) as here:
            yield here
    else:
        from cli.there import Service  # noqa: PLC0415  the same for httpx

        async with AsyncClient(asked.url, api_key=asked.api_key, timeout=600) as client:
            yield Service(client, asked)
