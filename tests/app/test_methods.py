"""HEAD wherever there is GET, the right `Allow` of a 405, and OPTIONS."""

import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from tests.app.conftest import MakeClient, png
from tests.app.processes import LIGHT, Server, serving

GETS = [
    "/", "/docs", "/openapi.json", "/metrics", "/health", "/health/live", "/health/ready", "/models",
    "/models/pvt_v2_b0.digits", "/v1/models", "/v2", "/v2/health/live", "/v2/health/ready",
    "/v2/models/pvt_v2_b0.digits", "/v2/models/pvt_v2_b0.digits/ready", "/static-offline-docs/swagger-ui.css",
]  # fmt: skip
REFUSED = ["/nothing", "/models/nothing", "/v1/nothing", "/predict", "/models/", "/aliases"]
VARYING = {"x-request-id", "date", "server-timing"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(**LIGHT, trusted_proxies="127.0.0.1") as server:
        yield server


def asked(connection: HTTPConnection, method: str, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response, response.read()


@pytest.mark.parametrize("path", GETS + REFUSED)
def test_head_is_get_without_the_body_on_a_connection_that_goes_on(server: Server, path: str) -> None:
    url = httpx.URL(server.url)
    connection = HTTPConnection(url.host, url.port or 0, timeout=30)
    got, body = asked(connection, "GET", path)
    opened = connection.sock
    head, nothing = asked(connection, "HEAD", path)
    after, again = asked(connection, "GET", "/health/live")

    assert connection.sock is opened  # never closed in between
    connection.close()
    assert head.status == got.status
    assert nothing == b""
    assert (after.status, again[:1]) == (200, b"{")
    lengths = [head.headers.get("content-length"), got.headers.get("content-length")]
    differing = VARYING | ({"content-length"} if path == "/metrics" else set())  # the metrics have counted meanwhile
    first, second = ({n: v for n, v in each.headers.items() if n not in differing} for each in (got, head))
    assert first == second
    assert int(lengths[1] or 0) == len(body)
    assert lengths[0] is not None


def test_head_of_a_stream_has_no_length_and_the_connection_goes_on(server: Server) -> None:
    url = httpx.URL(server.url)
    connection = HTTPConnection(url.host, url.port or 0, timeout=30)
    head, _ = asked(connection, "HEAD", "/stats/stream")
    opened = connection.sock
    after, _ = asked(connection, "GET", "/health/live")

    assert (head.status, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert head.headers["content-length"] is None  # that of GET has none either
    assert connection.sock is opened
    assert after.status == 200
    connection.close()


def test_not_one_byte_of_a_body_follows_a_head(server: Server) -> None:
    """On the wire, where a client's library can't hide it."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        connection.sendall(b"HEAD /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(65536), b""))

    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) > 10_000
    assert rest == b""


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/predict", "OPTIONS, POST"),
        ("HEAD", "/predict", "OPTIONS, POST"),
        ("POST", "/models", "GET, HEAD, OPTIONS"),
        ("GET", "/models/x/pin", "DELETE, OPTIONS, POST"),
        ("POST", "/aliases/x", "DELETE, OPTIONS, PUT"),
        ("DELETE", "/", "GET, HEAD, OPTIONS"),
        ("POST", "/docs", "GET, HEAD, OPTIONS"),
        ("PUT", "/openapi.json", "GET, HEAD, OPTIONS"),
        ("POST", "/static-offline-docs/swagger-ui.css", "GET, HEAD, OPTIONS"),
        ("PATCH", "/v2/models/x/infer", "OPTIONS, POST"),
        ("TRACE", "/health", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_method_that_a_path_has_not_is_405_with_all_it_has(
    client: TestClient, method: str, path: str, allow: str
) -> None:
    refused = client.request(method, path)
    options = client.options(path)

    assert (refused.status_code, refused.headers["allow"]) == (405, allow)
    assert (options.status_code, options.headers["allow"], options.content) == (204, allow, b"")


def test_options_needs_no_key_and_an_unknown_path_has_none(make_client: MakeClient) -> None:
    client = make_client(api_keys="secret", management_keys="boss")

    assert client.options("/predict").status_code == 204
    assert client.options("/models/x/load").headers["allow"] == "OPTIONS, POST"
    assert client.options("/nothing").status_code == 404
    assert client.head("/models").status_code == 401
    assert client.head("/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_options_of_the_server_as_a_whole_lists_all_methods(server: Server) -> None:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        connection.sendall(
            b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\nGET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        received = b"".join(iter(lambda: connection.recv(65536), b""))

    first, _, second = received.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 204 ")
    assert b"allow: DELETE, GET, HEAD, OPTIONS, POST, PUT\r\n" in first
    assert second.startswith(b"HTTP/1.1 200 ")


def test_head_is_counted_and_logged_as_head(server: Server) -> None:
    httpx.head(f"{server.url}/models")
    while (line := server.event("request"))["method"] != "HEAD" or line["path"] != "/models":
        pass
    metrics: Any = httpx.get(f"{server.url}/metrics").text

    assert line["status"] == 200
    assert 'pvt_http_requests_total{method="HEAD",route="/models",status="200"}' in metrics


def test_a_body_with_a_head_is_read_past(server: Server) -> None:
    url = httpx.URL(server.url)
    connection = HTTPConnection(url.host, url.port or 0, timeout=30)
    connection.request("HEAD", "/health", body=png())
    first = connection.getresponse()
    first.read()
    second, body = asked(connection, "GET", "/health/live")
    connection.close()

    assert (first.status, second.status) == (200, 200)
    assert body.startswith(b"{")
