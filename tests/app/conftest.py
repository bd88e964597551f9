from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings

MakeClient = Callable[..., TestClient]


def png(colour: str = "white", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def client(model_store: Path) -> Iterator[TestClient]:
    """The service as a fresh checkout runs it."""
    with TestClient(create_app(Settings(model_store=model_store)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def make_client(model_store: Path) -> Iterator[MakeClient]:
    """Makes a service with other settings."""
    with ExitStack() as stack:

        def make(**settings: Any) -> TestClient:
            app = create_app(Settings(**{"model_store": model_store, **settings}))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make
