import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pvt_client import AsyncClient, Client
from tests.pvt_client.scripted import FakeTime

CallMethod = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> CallMethod:
    """Calls a method of either kind of client: call(url, "predict", image, ..., client={"timeout": 3}, time=...)."""

    def synchronously(url: str, method: str, *args: Any, client: dict[str, Any], time: FakeTime, **options: Any) -> Any:
        with Client(url, clock=time.clock, **client) as opened:
            result = getattr(opened, method)(*args, **options)
            return list(result) if method.endswith("_many") else result

    async def asynchronously(
        url: str, method: str, *args: Any, client: dict[str, Any], time: FakeTime, **options: Any
    ) -> Any:
        async with AsyncClient(url, clock=time.clock, **client) as opened:
            result = getattr(opened, method)(*args, **options)
            return [each async for each in result] if method.endswith("_many") else await result

    def call(
        url: str,
        method: str,
        *args: Any,
        client: dict[str, Any] | None = None,
        time: FakeTime | None = None,
        **options: Any,
    ) -> Any:
        given = {"client": client or {}, "time": time or FakeTime(), **options}
        if request.param == "sync":
            return synchronously(url, method, *args, **given)
        return asyncio.run(asynchronously(url, method, *args, **given))

    return call
