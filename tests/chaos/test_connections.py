"""Clients that are silent, slow, deaf, half closed or too many: others never notice."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest

from tests.app.conftest import png
from tests.app.processes import LIGHT, Server, serving

HEALTH = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(**LIGHT, client_timeout_seconds="1", keep_alive_seconds="1", preload="pvt_v2_b0.digits") as server:
        yield server


def connect(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=30)


def predict(body: bytes, *headers: str) -> bytes:
    lines = ["POST /predict HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def dribble(connection: socket.socket, data: bytes) -> bytes:
    """Send a byte every tenth of a second until there is an answer; returns it."""
    connection.settimeout(0.1)
    for index in range(100):
        connection.sendall(data[index : index + 1])
        try:
            return connection.recv(65536)
        except TimeoutError:
            pass
    pytest.fail("it may go on for ever")


@pytest.mark.parametrize("head", [b"GET /health HTTP/1.1\r\nX: ", predict(b"x" * 9000)[:-9000]])
def test_a_head_or_a_body_that_dribbles_is_refused(server: Server, head: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(head)

        answer = dribble(connection, b"x" * 100)

    assert answer.startswith(b"HTTP/1.1 408")
    assert b"PVT_CLIENT_TIMEOUT_SECONDS" in answer


def test_a_slow_body_that_makes_progress_is_read(server: Server) -> None:
    image = png(size=(2000, 1000))
    with connect(server) as connection:
        sent = predict(image)
        for start in range(0, len(sent), 1500):
            connection.sendall(sent[start : start + 1500])
            time.sleep(0.3)  # the client's own pace, which is what is tested

        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("first", [b"", HEALTH])
def test_a_silent_connection_is_closed(server: Server, first: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(first)

        answer = read_all(connection)

    assert answer.startswith(b"HTTP/1.1 200") if first else answer == b""


def test_beyond_the_limit_the_longest_silent_connections_are_closed_for_new_ones() -> None:
    limited = ("sh", "-c", 'ulimit -n 300 && exec "$@"', "sh")
    with serving(**LIGHT, prefix=limited, preload="pvt_v2_b0.digits") as server, ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connect(server))

        answer = httpx.get(f"{server.url}/health/live", timeout=15)  # silent ones end by themselves after 20 s

        assert answer.status_code == 200
        assert httpx.post(f"{server.url}/predict", files={"image": png()}, timeout=60).status_code == 200
        assert server.event("connections_exhausted")["limit"] < 300
    assert any(line["event"] == "few_descriptors" for line in server.seen)


def test_a_client_that_does_not_read_is_cut_off(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)

        assert server.event("client_does_not_read")["seconds"] == 1
        with pytest.raises(ConnectionResetError):
            read_all(connection)


def test_a_client_that_reads_slowly_gets_everything(server: Server) -> None:
    requests, received = 300, 0
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * requests)
        size = len(httpx.get(f"{server.url}/openapi.json").content)
        started = time.monotonic()
        while received < requests * size:
            data = connection.recv(200_000)
            assert data
            received += len(data)
            if time.monotonic() - started < 4:
                time.sleep(0.2)  # the client's own pace, which is what is tested


def test_requests_sent_during_a_pause_are_answered() -> None:
    with serving(**LIGHT) as server, ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(8)]
        for connection in connections:
            connection.sendall(HEALTH)
            response = HTTPResponse(connection)
            response.begin()
            response.read()
        os.kill(server.process.pid, signal.SIGSTOP)
        for connection in connections:
            connection.sendall(HEALTH)
        time.sleep(6)  # the length of the pause, which is what is tested
        os.kill(server.process.pid, signal.SIGCONT)

        assert [connection.recv(65536)[:12] for connection in connections] == [b"HTTP/1.1 200"] * 8


@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_half_closes_gets_its_answers(server: Server, digits: Path, count: int) -> None:
    with connect(server) as connection:
        connection.sendall(predict((digits / "seven.png").read_bytes()) * count)
        connection.shutdown(socket.SHUT_WR)

        answer = read_all(connection)

    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.count(b'"label":"7"') == answer.count(b"HTTP/1.1 200 OK") == count


def test_an_expectation_with_a_space_behind_it_is_met(server: Server) -> None:
    image = png()
    with connect(server) as connection:
        connection.sendall(predict(image, "Expect: 100-continue ")[: -len(image)])
        told = connection.recv(65536)
        connection.sendall(image)

        assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_what_is_no_request_is_counted_among_the_refusals(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 505"

    while 'pvt_rejected_total{reason="unsupported-version"} 1.0' not in httpx.get(f"{server.url}/metrics").text:
        time.sleep(0.05)  # a page that was rendered just before is served again
