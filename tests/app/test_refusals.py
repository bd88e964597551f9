"""What is refused before the application sees it: problems as another parser, h11, reads them."""

import json
from typing import Any

import h11
import pytest

from tests.app.wire import CHUNKED, NEXT, POST, Message, Receive, Send, answer, asked, exchange

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n"
REFUSED = {
    "no host": (b"GET /a HTTP/1.1\r\n\r\n", 400, "no `Host`, which HTTP/1.1 has"),
    "two hosts": (GET + b"Host: y\r\n\r\n", 400, "more than one `Host`"),
    "a host with a blank": (b"GET /a HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "'a b' is no `Host`"),
    "a host with a path": (b"GET /a HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "'a/b' is no `Host`"),
    "a host with a user": (b"GET /a HTTP/1.1\r\nHost: u@a\r\n\r\n", 400, "'u@a' is no `Host`"),
    "a host with a word for a port": (b"GET /a HTTP/1.1\r\nHost: a:b\r\n\r\n", 400, "'a:b' is no `Host`"),
    "a host of other bytes": (b"GET /a HTTP/1.1\r\nHost: \xe9\r\n\r\n", 400, "'é' is no `Host`"),
    "two framings": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "send one of the two"),
    "compressed chunks": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "only `Transfer-Encoding: chunked`"),
    "another expectation": (POST + b"Expect: tea\r\n\r\n", 417, "only `Expect: 100-continue`"),
    "one expectation too many": (POST + b"Expect: 100-continue, tea\r\n\r\n", 417, "only `Expect: 100-continue`"),
    "a blank in the target": (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400, "a blank in the path is written %20"),
    "other bytes in the target": (b"GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "is written %XX"),
    "no path": (b"GET a HTTP/1.1\r\nHost: x\r\n\r\n", 400, "a target is a path such as /predict"),
    "a host and a port": (b"GET x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "a target is a path such as /predict"),
    "the whole server": (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400, "'*' is neither a path"),
    "another scheme": (b"GET ftp://x/a HTTP/1.1\r\nHost: x\r\n\r\n", 400, "nor an http URL"),
    "a password": (b"GET http://u:p@x/a HTTP/1.1\r\nHost: x\r\n\r\n", 400, "nor an http URL"),
    "another protocol's target": (b"OPTIONS rtsp://x/a RTSP/1.0\r\nCSeq: 1\r\n\r\n", 400, "nor an http URL"),
    "no header": (GET + b"a header\r\n\r\n", 400, "a header is `Name: value`"),
    "a header without a name": (GET + b": a\r\n\r\n", 400, "a header is `Name: value`"),
    "a zero in a header": (GET + b"A: \0\r\n\r\n", 400, "header value"),
    "line feeds": (b"GET /a HTTP/1.1\nHost: x\n\n", 400, "each line ends with CR LF"),
    "a broken chunk": (CHUNKED + b"zz\r\n", 400, "chunk size"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "without prior knowledge of HTTP/2"),
    "HTTP/1.2": (b"GET /a HTTP/1.2\r\nHost: x\r\n\r\n", 505, "send HTTP/1.1"),
    "HTTP/3": (b"GET /a HTTP/3.0\r\nHost: x\r\n\r\n", 505, "send HTTP/1.1"),
    "HTTP/0.9": (b"GET /a\r\n\r\n", 505, "HTTP/0.9 is not spoken here"),
    "TLS": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", 400, "write http:// in place of https://"),
    "a proxy's line": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n" + NEXT, 400, "the PROXY protocol: turn it off"),
    "a proxy's bytes": (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + NEXT, 400, "the PROXY protocol: turn it off"),
    "SOCKS": (b"\5\1\0", 400, "this is no proxy"),
    "a greeting": (b"EHLO example.org\r\n", 400, "no valid HTTP/1.1 request"),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 501, "this is no proxy"),
    "a method of its own": (b"BREW /a HTTP/1.1\r\nHost: x\r\n\r\n", 501, "knows the method 'BREW'"),
    "a small method": (b"get /a HTTP/1.1\r\nHost: x\r\n\r\n", 501, "'get'; GET, POST and others are in capitals"),
    "a large head": (GET + b"A: " + b"b" * 70_000 + b"\r\n\r\n", 431, "the request's head is larger than 65536"),
    "a large target": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "send images in the body"),
}  # fmt: skip


def read(written: bytes, method: str = "GET") -> list[tuple[h11.Response, bytes]]:
    """The responses in `written`, and their bodies, as h11's client reads them."""
    client = h11.Connection(h11.CLIENT)
    found: list[tuple[h11.Response, bytes]] = []
    client.receive_data(written)
    while not found or client.our_state is h11.DONE:
        if found:
            client.start_next_cycle()
        client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        response, body = client.next_event(), b""
        assert isinstance(response, h11.Response)
        while isinstance(event := client.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        found.append((response, body))
    assert client.trailing_data[0] == b""
    return found


def checked(response: h11.Response, body: bytes) -> Any:
    """The problem in the body of a refusal."""
    headers = dict(response.headers)
    problem = json.loads(body)
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"content-length"] == b"%d" % len(body)
    assert headers[b"connection"] == b"close"
    assert headers[b"x-request-id"].decode() == problem["request_id"]
    assert problem["status"] == response.status_code
    assert problem["type"].startswith("urn:pvt-serve:problem:")
    return problem


@pytest.mark.parametrize("before", [b"", NEXT, NEXT * 3])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_a_problem_behind_the_responses_to_what_came_before(case: str, before: bytes) -> None:
    raw, status, detail = REFUSED[case]

    wire = exchange(before + raw)

    *earlier, refusal = read(bytes(wire.written))
    assert [response.status_code for response, _ in earlier] == [200] * before.count(b"GET")
    problem = checked(*refusal)
    assert (problem["status"], wire.ended) == (status, True)
    assert detail in problem["detail"]


@pytest.mark.parametrize("case", REFUSED)
def test_what_comes_byte_by_byte_is_refused_too(case: str) -> None:
    raw, status, _ = REFUSED[case]

    (refusal,) = read(bytes(exchange(*(raw[i : i + 1] for i in range(len(raw)))).written))

    assert checked(*refusal)["status"] in {status, 400}  # an unknown method is known by its whole line


def test_each_refusal_has_an_id_of_its_own_or_the_clients() -> None:
    bad = b"GET /a HTTP/1.1\r\nX-Request-ID: mine\r\n\r\n"
    first = NEXT.replace(b"\r\n\r\n", b"\r\nX-Request-ID: another\r\n\r\n")

    ids = [checked(*read(bytes(exchange(raw).written))[-1])["request_id"]
           for raw in (bad, first + bad, b"?", b"?", first + b"?", first + b"\x16")]  # fmt: skip

    assert ids[:2] == ["mine", "mine"]
    assert len({*ids[2:]}) == 4
    assert "another" not in ids


def test_a_body_that_breaks_is_refused_under_the_requests_id() -> None:
    async def app(scope: Message, receive: Receive, _: Send) -> None:
        scope["state"]["request_id"] = "given"  # by the application
        while (await receive())["type"] != "http.disconnect":
            pass

    wire = exchange(CHUNKED, b"3\r\nabcd\r\n", app=app, in_turn=True)

    assert checked(*read(bytes(wire.written))[0])["request_id"] == "given"


def test_a_refusal_of_head_has_no_body() -> None:
    wire = exchange(b"HEAD /a HTTP/1.1\r\n\r\n")

    ((response, body),) = read(bytes(wire.written), "HEAD")
    assert (response.status_code, body) == (400, b"")


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"http://example.org:80/a?b=c", "/a", b"example.org:80"),
        (b"HTTP://EXAMPLE.org/a#b", "/a", b"EXAMPLE.org"),
        (b"https://example.org/a%20b", "/a b", b"example.org"),
        (b"http://[::1]:80/", "/", b"[::1]:80"),
        (b"http://example.org", "/", b"example.org"),
        (b"http://example.org?b=c", "/", b"example.org"),
        (b"/a", "/a", b"x"),
        (b"//a", "//a", b"x"),
    ],
)
def test_an_absolute_target_is_its_path_and_its_host(target: bytes, path: str, host: bytes) -> None:
    seen: list[Message] = []

    async def app(scope: Message, _: Receive, send: Send) -> None:
        seen.append(scope)
        await answer("", send)

    exchange(b"GET " + target + b" HTTP/1.1\r\nA: b\r\nHost: x\r\n\r\n" + NEXT, app=app)

    assert [scope["path"] for scope in seen] == [path, "/next"]
    assert seen[0]["query_string"] == (b"b=c" if b"b=c" in target else b"")
    assert seen[0]["headers"] == [(b"a", b"b"), (b"host", host)]


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /a HTTP/1.0\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: [fe80::1%25eth0]:8000\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: my_service.namespace.svc:8000\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: %2Frun%2Fpvt.sock\r\n\r\n",
        b"GET /a HTTP/1.0\r\nExpect: tea\r\n\r\n",
    ],
)
def test_what_a_request_may_have_is_answered(raw: bytes) -> None:
    assert asked(exchange(raw)) == [["GET", "/a", ""]]
