"""The application under servers and applications that are not ours."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
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


UVICORN = ("uvicorn", "--port", "0")
GUNICORN = ("gunicorn", "--bind", "127.0.0.1:0", "--worker-class")


@contextmanager
def hosted(*command: str, **settings: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Another server's own command on a free port: the process, where it listens, and what it writes from then on."""
    environment = {**os.environ, **{f"PVT_{name.upper()}": value for name, value in settings.items()}}
    arguments = [sys.executable, "-m", *command]
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        found = (re.search(r"(?:running on|Listening at:) (\S+)", line) for line in process.stderr)
        lines: list[str] = []
        reader = threading.Thread(target=lines.extend, args=(process.stderr,))
        try:
            url = next(match[1] for match in found if match)
            reader.start()
            yield process, url, lines
        finally:
            process.terminate()  # the parent of gunicorn's workers ends them
            try:
                process.wait(30)
            finally:
                process.kill()
            if reader.ident:
                reader.join()


@pytest.mark.parametrize(
    "command",
    [
        (*UVICORN, "--factory", "app.main:create_app"),
        (*UVICORN, "app.asgi:app"),
        (*GUNICORN, "uvicorn_worker.UvicornWorker", "app.main:create_app()"),
        (*GUNICORN, "uvicorn.workers.UvicornWorker", "--preload", "app.asgi:app"),  # forked after the import
    ],
    ids=["factory", "object", "gunicorn", "preloaded"],
)
def test_other_servers_own_commands_serve_with_settings_from_the_environment(command: Sequence[str]) -> None:
    with hosted(*command, backend="torch", max_batch_size="1", max_images="1", log_format="json") as (
        process,
        url,
        lines,
    ):
        answered = httpx.post(f"{url}/predict", files=IMAGE, timeout=60)
        refused = httpx.post(f"{url}/predict", files=[("image", png())] * 2, timeout=60)
        process.send_signal(signal.SIGTERM)

        assert answered.json()["model"] == "pvt_v2_b0.digits"
        assert "PVT_MAX_IMAGES" in refused.json()["detail"]
        assert process.wait(30) in {0, -signal.SIGTERM}  # as each of them has it
    statuses = [json.loads(line)["status"] for line in lines if '"event":"request"' in line]
    assert statuses == [200, 422]


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
