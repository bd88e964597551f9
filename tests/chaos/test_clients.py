"""Who asks: limits, keys and what strangers learn, on a real server."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from statistics import median
from threading import Event
from time import monotonic

import httpx
import pytest

from tests.app.conftest import png
from tests.app.processes import ROOT, Server, serving

LIGHT = {"PVT_BACKEND": "torch", "PVT_INSTANCES": "1", "PVT_MAX_BATCH_SIZE": "1"}
KEY = "schl\u00fcssel-\u00e0"  # whose last byte in UTF-8 is a space in Latin-1


@pytest.fixture(scope="module")
def limited() -> Iterator[Server]:
    with serving(environment=LIGHT, client_concurrency="2", trusted_proxies="127.0.0.1") as server:
        yield server


def test_a_refusal_comes_before_the_body_and_others_go_on(limited: Server) -> None:
    """Two uploads that never end take the places of one client only."""
    mine = {"X-Forwarded-For": "192.0.2.1"}
    other = {"X-Forwarded-For": "2001:db8::7"}
    files = {"image": png()}

    def upload() -> socket.socket:
        host, _, port = limited.url.removeprefix("http://").rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=20)
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.1\r\n"
        connection.sendall(head + b"Content-Type: image/png\r\nContent-Length: 30000000\r\n\r\n")
        return connection

    stalled = [upload(), upload()]
    try:
        end = monotonic() + 20
        while httpx.get(f"{limited.url}/models", headers=mine).status_code != 429:
            assert monotonic() < end
        third = upload()
        head = b""
        while b"allows" not in head and (more := third.recv(65_536)):
            head += more
        third.close()
        answers = [httpx.post(f"{limited.url}/predict", files=files, headers=other).status_code for _ in range(5)]
    finally:
        for connection in stalled:
            connection.close()

    assert head.startswith(b"HTTP/1.1 429 ")
    assert b"PVT_CLIENT_CONCURRENCY" in head
    assert b"retry-after: " in head.lower()
    assert answers == [200] * 5
    end = monotonic() + 20
    while httpx.post(f"{limited.url}/predict", files=files, headers=mine).status_code != 200:  # who hung up is gone
        assert monotonic() < end


def test_who_waits_as_long_as_told_is_let_in() -> None:
    statuses: list[int] = []
    with ExitStack() as stack:
        server = stack.enter_context(serving(environment=LIGHT, client_rate="2", client_burst="2"))
        client = stack.enter_context(httpx.Client(base_url=server.url))
        begin = monotonic()
        while len(statuses) < 6:
            response = client.post("/predict", files={"image": png()})
            statuses.append(response.status_code)
            end = monotonic() + int(response.headers.get("Retry-After", 0))
            while monotonic() < end:
                assert client.get("/health").status_code == 200  # probes are never refused

    assert statuses[0] == 200
    assert 429 in statuses
    assert (429, 429) not in pairwise(statuses)
    assert monotonic() - begin < 20


def test_metrics_and_the_document_are_no_lever(keyed: Server) -> None:
    """Sixteen connections that ask for nothing else leave a probe its time."""
    stop, answered = Event(), list[str]()

    def ask(path: str) -> None:
        with httpx.Client(base_url=keyed.url) as client:
            while not stop.is_set():
                assert client.get(path).status_code == 200
                answered.append(path)

    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(ask, path) for path in ("/metrics", "/openapi.json") * 8]
        try:
            seconds = list[float]()
            while len(seconds) < 50 or len(answered) < 100:
                begin = monotonic()
                assert client.get(f"{keyed.url}/health/live").status_code == 200
                seconds.append(monotonic() - begin)
        finally:
            stop.set()

    assert median(seconds) < 1
    for each in asking:
        each.result()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_with_any_letters_opens_the_door(keyed: Server, encoding: str) -> None:
    good = httpx.get(f"{keyed.url}/models", headers={b"Authorization": b"Bearer " + KEY.encode(encoding)})
    bad = httpx.get(f"{keyed.url}/models", headers={b"Authorization": b"Bearer " + KEY.encode(encoding)[:-1]})

    assert (good.status_code, bad.status_code) == (200, 401)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    with serving(environment=LIGHT, api_keys=f"{KEY},another") as server:
        yield server


@pytest.mark.parametrize(("name", "value"), [("PVT_API_KEYS", "good,,one"), ("PVT_MANAGEMENT_KEYS", "")])
def test_a_blank_key_refuses_to_start(name: str, value: str) -> None:
    command = [sys.executable, "-m", "app"]
    done = subprocess.run(command, cwd=ROOT, env={name: value}, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 2
    assert done.stderr.startswith(f"pvt-serve: {name}: ")
    assert "blank" in done.stderr
    assert "good" not in done.stderr


PATHS = ["/predict", "/features", "/explain", "/models", "/models/x", "/health", "/metrics", "/docs", "/openapi.json",
         "/v1/embeddings", "/v1/models", "/v2/models/x/infer", "/v2/repository/index", "/models/x/load", "/aliases",
         "/debug/scheduler"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_a_slash_too_many_is_no_redirect_to_a_host_of_the_clients(keyed: Server, method: str, path: str) -> None:
    for given in (f"{path}/", f"{path}//"):
        response = httpx.request(method, keyed.url + given, headers={"Host": "evil.example"})

        assert "location" not in response.headers
        assert response.status_code == 404
        if method != "HEAD":
            # curl adds the file's name behind the slash of curl -T FILE URL/
            way = "curl -X POST -T FILE" if method == "PUT" else f"send it to {path}, without the slash"
            assert way in response.text
