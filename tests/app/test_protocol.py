"""What comes over a connection is read in one way, and as uvicorn's other protocol, h11, reads it."""

from typing import Any

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.protocol import BoundedProtocol
from tests.app.wire import (
    BODIES,
    CHUNKED,
    NEXT,
    OFFERS,
    POST,
    SMUGGLED,
    Message,
    Receive,
    Send,
    answer,
    asked,
    echo,
    exchange,
)

REFUSED = {
    "two framings": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "two framings, other way round": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 40\r\n\r\nabc", 400),
    "two lengths in one": (POST + b"Content-Length: 3, 40\r\n\r\nabc", 400),
    "a signed length": (POST + b"Content-Length: +3\r\n\r\nabc", 400),
    "a negative length": (POST + b"Content-Length: -3\r\n\r\nabc", 400),
    "a hexadecimal length": (POST + b"Content-Length: 0x3\r\n\r\nabc", 400),
    "no length": (POST + b"Content-Length:\r\n\r\nabc", 400),
    "a length beyond 64 bits": (POST + b"Content-Length: 18446744073709551619\r\n\r\nabc", 400),
    "chunked, identity": (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
    "chunked twice": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n", 501),
    "identity, chunked": (POST + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    "gzip, chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "gzip, chunked, and an upgrade": (
        POST + OFFERS["TLS"] + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "almost chunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "chunked over two headers": (POST + b"Transfer-Encoding: chun\r\nTransfer-Encoding: ked\r\n\r\n0\r\n\r\n", 501),
    "a space before the colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    "a folded header": (POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    "a folded upgrade": (POST + b"Connection: x,\r\n upgrade\r\nUpgrade: h2c\r\nContent-Length: 1\r\n\r\na", 400),
    "a space before the first header": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "bare line feeds": (b"POST / HTTP/1.1\nHost: x\nContent-Length: 3\n\nabc", 400),
    "a bare line feed": (POST + b"A: b\nContent-Length: 3\r\n\r\nabc", 400),
    "a bare line feed at the end": (POST + b"Content-Length: 3\r\n\nabc", 400),
    "a bare carriage return": (POST + b"A: b\rContent-Length: 3\r\n\r\nabc", 400),
    "a zero byte": (POST + b"Content-Length: 3\0\r\n\r\nabc", 400),
    "two hosts": (POST + b"Host: y\r\n\r\n", 400),
    "a chunk size with a space": (CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n", 400),
    "a chunk size in C's way": (CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n", 400),
    "a negative chunk size": (CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n", 400),
    "a chunk size beyond 64 bits": (CHUNKED + b"10000000000000003\r\nabc\r\n0\r\n\r\n", 400),
    "no chunk size": (CHUNKED + b"\r\nabc\r\n0\r\n\r\n", 400),
    "a line feed behind a chunk size": (CHUNKED + b"3\nabc\r\n0\r\n\r\n", 400),
    "a line feed in a chunk extension": (CHUNKED + b"3;a\nabc\r\n0\r\n\r\n", 400),
    "a chunk that is longer": (CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n", 400),
    "a line feed behind the last chunk": (CHUNKED + b"3\r\nabc\r\n0\r\n\n", 400),
    "a length behind chunks": (CHUNKED + b"3\r\nabc\r\n0\r\nContent-Length: 40\r\n\r\n", 400),
    "a coding behind chunks": (CHUNKED + b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 501),
    "CONNECT to a path": (b"CONNECT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n", 501),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 505),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    "HTTP/0.9": (b"GET /\r\n\r\n", 505),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "no target": (b"GET http: HTTP/1.1\r\nHost: x\r\n\r\n", 400),
}  # fmt: skip


def singly(raw: bytes) -> list[bytes]:
    return [raw[i : i + 1] for i in range(len(raw))]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("offer", OFFERS)
def test_an_offer_to_upgrade_is_ignored_however_it_comes(offer: str, body: str) -> None:
    sent, read = BODIES[body]
    request = POST + OFFERS[offer] + sent
    raw = request + request + NEXT
    expected = [["POST", "/a", read.decode()]] * 2 + [["GET", "/next", ""]]

    assert asked(exchange(request, request, NEXT, protocol=H11Protocol, in_turn=True)) == expected
    assert asked(exchange(raw)) == expected
    assert asked(exchange(*singly(raw))) == expected
    for cut in range(len(request), 2 * len(request)):
        assert asked(exchange(raw[:cut], raw[cut:], in_turn=True)) == expected


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("first", [b"POST /a HTTP/1.0\r\n", POST + b"Connection: close\r\n"])
def test_an_offer_on_a_connection_that_is_to_be_closed_keeps_its_body(first: bytes, offer: str) -> None:
    raw = first + OFFERS[offer] + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED

    for pieces in ([raw, NEXT], [raw + NEXT], singly(raw + NEXT)):
        wire = exchange(*pieces)

        assert asked(wire) == [["POST", "/a", SMUGGLED.decode()]]
        assert wire.ended


def test_chunks_in_http_1_0_are_read_and_the_connection_closed() -> None:
    raw = b"\r\n\r\nPOST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + NEXT
    for pieces in ([raw], singly(raw)):
        wire = exchange(*pieces)

        assert asked(wire) == [["POST", "/a", "abc"]]
        assert wire.ended


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused_and_the_rest_never_read(case: str) -> None:
    raw, status = REFUSED[case]
    for pieces in ([raw + SMUGGLED], [raw, SMUGGLED], singly(raw + SMUGGLED)):
        for before in (b"", NEXT):
            wire = exchange(before, *pieces) if before else exchange(*pieces)

            *earlier, (refusal, problem) = wire.answers()
            assert [answer[0] for answer in earlier] == ([200] if before else [])
            assert refusal == problem["status"] == status
            assert wire.ended


@pytest.mark.parametrize(
    "raw",
    [
        POST + b"Content-Length:\t3 \t\r\n\r\nabc",
        POST + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n0003\r\nabc\r\n00\r\n\r\n",
        CHUNKED + b'3;a="b";c\r\nabc\r\n0;d=e\r\nConnection: upgrade\r\nUpgrade: h2c\r\nHost: y\r\nX: y\r\n\r\n',
        POST + b"Content-Length: 3\r\nX-Content-Length: 40\r\nContent_Length: 40\r\nX: \r\n\r\nabc",
    ],
)
def test_what_is_odd_but_has_one_meaning_is_read(raw: bytes) -> None:
    expected = [["POST", "/a", "abc"], ["GET", "/next", ""]]

    assert asked(exchange(raw, NEXT, protocol=H11Protocol, in_turn=True)) == expected
    assert asked(exchange(raw + NEXT)) == asked(exchange(*singly(raw + NEXT))) == expected


def test_headers_behind_a_body_are_none_of_the_requests() -> None:
    (_, answer), = exchange(CHUNKED + b"0\r\nAuthorization: Bearer key\r\n\r\n").answers()  # fmt: skip

    assert answer["headers"] == 2


@pytest.mark.parametrize("first", [CHUNKED, POST + OFFERS["TLS"] + b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_trailer_closes_no_connection(first: bytes) -> None:
    raw = first + b"3\r\nabc\r\n0\r\nConnection: close\r\n\r\n"
    expected = [["POST", "/a", "abc"], ["GET", "/next", ""]]

    assert asked(exchange(raw, NEXT, protocol=H11Protocol, in_turn=True)) == expected
    for pieces in ([raw, NEXT], [raw + NEXT], singly(raw + NEXT)):
        assert asked(exchange(*pieces)) == expected


@pytest.mark.parametrize("protocol", [BoundedProtocol, H11Protocol])
def test_a_client_of_http_1_0_is_not_told_to_go_on(protocol: type[Any]) -> None:
    wire = exchange(
        b"POST /a HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n",
        b"abc",
        protocol=protocol,
        in_turn=True,
    )

    assert asked(wire) == [["POST", "/a", "abc"]]
    assert b" 100 " not in wire.written


def test_a_request_behind_others_whose_body_is_broken_is_not_begun() -> None:
    begun = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        begun.append(scope["path"])
        await echo(scope, receive, send)

    wire = exchange(NEXT, CHUNKED + b"3\r\nabcd\r\n", app=app)

    assert [status for status, _ in wire.answers()] == [200, 400]
    assert begun == ["/next"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_request_that_breaks_behind_its_answer_gets_no_second_one(whole: bool) -> None:
    async def app(_: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"1" + b"2" * whole, "more_body": not whole})
        while (await receive())["type"] != "http.disconnect":
            pass

    wire = exchange(CHUNKED, b"3\r\nabcd\r\n", NEXT, app=app, in_turn=True)

    assert wire.written.count(b"HTTP/1.1 ") == 1
    assert wire.ended


def test_a_client_that_was_not_told_to_go_on_can_ask_nothing_more() -> None:
    async def app(_: Message, __: Receive, send: Send) -> None:
        await answer("no", send)

    wire = exchange(POST + b"Expect: 100-continue\r\nContent-Length: 40\r\n\r\n", NEXT, NEXT, app=app, in_turn=True)

    assert wire.answers() == [(200, "no")]
    assert wire.ended
