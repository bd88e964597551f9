"""The process as it is deployed: a real server, real sockets, real signals."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from time import monotonic

import httpx
import pytest

from tests.app.conftest import png
from tests.app.processes import LIGHT, Server, post, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all tests that do not end it."""
    with serving(**LIGHT, max_body_mb="8") as server:
        yield server


def begin_upload(connection: socket.socket, server: Server, length: int, first: bytes, *headers: str) -> None:
    """Send the beginning of an image of `length` bytes, and wait until the server has read it."""
    head = [
        "POST /predict HTTP/1.1",
        "Host: x",
        "Content-Type: image/png",
        f"Content-Length: {length}",
        *headers,
        "",
        "",
    ]
    connection.sendall("\r\n".join(head).encode() + first)
    httpx.get(f"{server.url}/health")  # what came before this has been read when it is answered


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_finishes_what_is_under_way_and_exits_0(workers: str) -> None:
    with serving(**LIGHT, workers=workers) as server:
        answers: list[httpx.Response] = []
        work = [("image", png(size=(3000, 3000)))] * 30
        caller = threading.Thread(target=lambda: answers.append(post(server.url, work)))
        caller.start()
        server.event("model_loaded")

        assert server.stop() == 0
        caller.join()

    assert [answer.status_code for answer in answers] == [200]
    assert len(answers[0].json()["results"]) == 30


@pytest.mark.parametrize("workers", ["1", "2"])
def test_with_a_drain_delay_it_serves_on_after_sigterm_but_is_not_ready_until_the_second(workers: str) -> None:
    with serving(**LIGHT, workers=workers, drain_delay_seconds="3600") as server:
        assert post(server.url, [("image", png())]).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        for _ in range(int(workers)):
            server.event("leaving")

        ready, live = (httpx.get(f"{server.url}/health/{which}") for which in ("ready", "live"))
        answer = post(server.url, [("image", png())])  # on a new connection

        assert (ready.status_code, live.status_code) == (503, 200)
        assert "the service is shutting down" in ready.json()["reasons"]
        assert answer.status_code == 200
        assert answer.headers["Connection"] == "close"
        assert server.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_nobody_who_presses_ctrl_c_waits_for_the_drain_delay(workers: str) -> None:
    with serving(**LIGHT, workers=workers, drain_delay_seconds="3600") as server:
        server.process.send_signal(signal.SIGINT)

        assert server.process.wait(30) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_under_load_no_accepted_request_is_lost_by_sigterm(workers: str) -> None:
    with serving(**LIGHT, workers=workers) as server:
        post(server.url, [("image", png())])
        statuses: list[int] = []

        def call() -> None:
            with httpx.Client(timeout=60) as client:
                while True:
                    try:
                        response = client.post(f"{server.url}/predict", files={"image": png(size=(300, 300))})
                    except httpx.ConnectError:
                        return  # refused before it was accepted
                    statuses.append(response.status_code)

        callers = [threading.Thread(target=call) for _ in range(8)]
        for caller in callers:
            caller.start()
        for _ in range(50):
            server.event("request")

        assert server.stop() == 0
        for caller in callers:
            caller.join(30)

    assert statuses.count(200) >= 50
    assert set(statuses) <= {200, 503}


def test_a_caller_that_hangs_up_takes_its_images_along(server: Server) -> None:
    assert post(server.url, [("image", png())]).status_code == 200
    request = httpx.Request("POST", f"{server.url}/predict", files=[("image", png(size=(4000, 4000)))] * 40)
    url = httpx.URL(server.url)

    with socket.create_connection((url.host, url.port)) as connection:
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        connection.sendall(f"POST /predict HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        httpx.get(f"{server.url}/health")  # by its answer the request before it has been read

    while server.event("request")["status"] != 499:
        pass
    cancelled = [line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if "cancelled" in line]

    assert any(line.startswith("pvt_cancelled_total") and float(line.split()[-1]) > 1 for line in cancelled)


def test_an_upload_under_way_is_not_cut_off_by_sigterm(digits: Path) -> None:
    image = (digits / "seven.png").read_bytes()
    with serving(**LIGHT) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port)) as connection:
            begin_upload(connection, server, len(image), image[:100])
            server.process.send_signal(signal.SIGTERM)
            server.event("draining")
            connection.sendall(image[100:])
            answer = connection.recv(65536)

        assert server.process.wait(30) == 0
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer.lower()


def test_an_upload_that_never_ends_does_not_keep_it_from_stopping_and_leaves_no_key_in_the_log() -> None:
    with serving(**LIGHT, drain_delay_seconds="1", shutdown_seconds="1", api_keys="hush-hush") as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port)) as connection:
            begin_upload(connection, server, 9, b"x", "Authorization: Bearer hush-hush")
            started = monotonic()

            assert server.stop() == 0
            assert monotonic() - started > 2  # the delay, then the limit
            assert connection.recv(65536).startswith(b"HTTP/1.1 503")
        lines = list(iter(server.lines.get, None))

    assert lines
    assert not [line for line in lines if "hush" in line]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_signal_gives_up_what_is_under_way(workers: str) -> None:
    with serving(**LIGHT, shutdown_seconds="3600", workers=workers) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nx"
            )
            httpx.get(f"{server.url}/health")
            server.process.send_signal(signal.SIGTERM)
            server.event("draining")

            assert server.stop() == 0
            assert connection.recv(65536).startswith(b"HTTP/1.1 503")


def test_a_body_that_is_too_large_is_told_so_even_to_a_client_that_sends_it_all(server: Server) -> None:
    for _ in range(5):
        headers = {"Content-Type": "image/png"}
        response = httpx.post(f"{server.url}/predict", content=b"x" * 20_000_000, headers=headers, timeout=60)

        assert response.status_code == 413


def test_a_request_head_without_end_is_refused(server: Server) -> None:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000)

        assert read_all(connection).startswith(b"HTTP/1.1 431")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_offer_of_http2_whose_body_comes_later_is_ignored_and_the_next_head_bounded(
    server: Server, digits: Path
) -> None:
    image = (digits / "seven.png").read_bytes()
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAA")
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        begin_upload(connection, server, len(image), b"", *offer)
        connection.sendall(image)
        with HTTPResponse(connection) as answer:
            answer.begin()
            label = json.load(answer)["results"][0]["predictions"][0]["label"]
        begin_upload(connection, server, len(image), b"", *offer, "X: " + "a" * 2_000_000)

        assert (answer.status, label) == (200, "7")
        assert read_all(connection).startswith(b"HTTP/1.1 431")


def test_http2_without_an_offer_is_told_what_to_do(server: Server) -> None:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        answer = read_all(connection)

    assert answer.startswith(b"HTTP/1.1 505")
    assert b"send HTTP/1.1, without prior knowledge of HTTP/2" in answer
