"""The application under servers and applications that are not ours."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message

from app.main import create_app
from app.settings import Settings, SettingsInvalid
from tests.app.conftest import png
from tests.app.processes import ROOT

IMAGE = {"image": png()}


@contextmanager
def uvicorn(*arguments: str, **settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Uvicorn's own command on a free port: the process, and where it listens."""
    environment = {**os.environ, **{f"PVT_{name.upper()}": value for name, value in settings.items()}}
    command = [sys.executable, "-m", "uvicorn", "--port", "0", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            yield process, next(match[1] for line in process.stderr if (match := re.search(r"running on (\S+)", line)))
        finally:
            process.kill()


@pytest.mark.parametrize("arguments", [("--factory", "app.main:create_app"), ("app.asgi:app",)])
def test_uvicorns_own_command_serves_with_settings_from_the_environment(arguments: Sequence[str]) -> None:
    with uvicorn(*arguments, backend="torch", max_batch_size="1", max_images="1") as (process, url):
        answered = httpx.post(f"{url}/predict", files=IMAGE, timeout=60)
        refused = httpx.post(f"{url}/predict", files=[("image", png())] * 2, timeout=60)
        process.send_signal(signal.SIGTERM)

        assert answered.json()["model"] == "pvt_v2_b0.digits"
        assert "PVT_MAX_IMAGES" in refused.json()["detail"]
        assert process.wait(30) in {0, -signal.SIGTERM}  # as uvicorn has it


def test_settings_of_the_environment_that_are_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_PORTS", "1")

    with pytest.raises(SettingsInvalid, match="PVT_PORTS is not a setting; the nearest one is PVT_PORT"):
        create_app()


async def test_a_server_without_lifespan_state_can_host_it(model_store: Path) -> None:
    app = create_app(Settings(model_store=model_store))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"} if not sent else await shut_down(app, sent)

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)

    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def shut_down(app: FastAPI, sent: list[Message]) -> Message:
    """What happens between start and end: a request whose scope has no state."""
    assert sent[0]["type"] == "lifespan.startup.complete"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.post("/predict", files=IMAGE)
    assert (response.status_code, response.json()["model"]) == (200, "pvt_v2_b0.digits")
    return {"type": "lifespan.shutdown"}


def test_it_can_be_mounted_in_another_application(model_store: Path) -> None:
    hosted = create_app(Settings(model_store=model_store))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with hosted.router.lifespan_context(hosted):
            yield

    host = FastAPI(lifespan=lifespan)
    host.mount("/images", hosted)
    with TestClient(host) as client:
        predicted = client.post("/images/predict", files=IMAGE)
        refused = client.post("/images/v2/models/none/infer", json={})

    assert (predicted.status_code, predicted.json()["model"]) == (200, "pvt_v2_b0.digits")
    assert (refused.status_code, [*refused.json()]) == (400, ["error"])  # in the protocol's form


def test_without_its_lifespan_it_says_what_is_missing(model_store: Path) -> None:
    client = TestClient(create_app(Settings(model_store=model_store)))

    with pytest.raises(RuntimeError, match="its host must run"):
        client.get("/health")
