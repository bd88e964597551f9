"""What comes over a connection is read in one way, and as uvicorn's other protocol, h11, reads it."""

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.protocol import MAX_HEAD_BYTES
from tests.app.wire import Message, Receive, Send, answer, asked, echo, exchange

NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"  # which is nothing but a body
POST = b"POST /a HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
OFFERS = {
    "h2c, as Java's client": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n",
    "TLS": b"Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n",
    "websocket": b"Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: e\r\n",
    "several": b"Connection: Upgrade\r\nUpgrade: foo/2, h2c\r\n",
    "several headers": b"connection: keep-alive, UPGRADE\r\nUPGRADE: foo\r\nupgrade:h2c\r\n",
    "without Connection": b"Upgrade: h2c\r\n",
    "without Upgrade": b"Connection: upgrade\r\n",
    "empty": b"Connection: upgrade\r\nUpgrade:\r\n",
    "Proxy-Connection": b"Proxy-Connection: upgrade\r\nUpgrade: h2c\r\n",
}
BODIES = {
    "none": (b"\r\n", b""),
    "length": (b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED, SMUGGLED),
    "chunked": (b"Transfer-Encoding: Chunked\r\n\r\n5;a=b\r\nGET /\r\n1E\r\n%b\r\n0\r\n\r\n" % SMUGGLED[5:], SMUGGLED),
    "expected": (b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
}
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


BEFORE = {
    "nothing": (b"", 0),
    "a head": (NEXT, 1),
    "a body": (POST + b"Content-Length: 3\r\n\r\nabc", 1),
    "chunks": (CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", 1),
    "an offer": (POST + OFFERS["TLS"] + b"Content-Length: 3\r\n\r\nabc", 1),
    "all of them": (NEXT + POST + OFFERS["several"] + BODIES["chunked"][0] + POST + BODIES["length"][0] + NEXT, 4),
}
LARGE = {
    "a target": (b"GET /", b" HTTP/1.1"),
    "a value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: ", b""),
    "spaces": (b"GET /a HTTP/1.1\r\nHost: x\r\nX:" + b" " * 60_000, b""),
    "a name, and an offer": (POST + OFFERS["TLS"] + b"X-", b": y"),
    "many headers": (b"GET /a HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"X: ", b""),
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("large", LARGE)
def test_every_head_of_a_connection_is_bounded(large: str, before: str) -> None:
    (first, last), (earlier, answered) = LARGE[large], BEFORE[before]
    for size, expected in ((MAX_HEAD_BYTES, 200), (MAX_HEAD_BYTES + 1, 431)):
        raw = earlier + first + b"a" * (size - len(first) - len(last)) + last + b"\r\n\r\n"
        for step in (len(raw), 4096, 16):
            wire = exchange(*(raw[i : i + step] for i in range(0, len(raw), step)))

            assert [status for status, _ in wire.answers()] == [200] * answered + [expected]
            assert wire.ended == (expected == 431)


def test_a_head_without_end_is_refused_once_it_is_too_large() -> None:
    for piece in (b"a", b" ", b"\r\n", b"a: b\r\n"):
        pieces = [piece * 1000] * 100
        first = b"" if piece == b"\r\n" else b"GET / HTTP/1.1\r\nX: " if piece in b"a " else b"GET / HTTP/1.1\r\n"

        assert [status for status, _ in exchange(first, *pieces).answers()] == [431]


def test_a_body_is_not_counted_as_head() -> None:
    large = b"a" * 200_000
    raw = POST + b"Content-Length: 200000\r\n\r\n" + large
    end = raw.index(b"\r\n\r\n")
    for cut in range(end, end + 6):
        assert asked(exchange(raw[:cut], raw[cut:] + NEXT)) == [["POST", "/a", large.decode()], ["GET", "/next", ""]]
    assert len(asked(exchange(NEXT * 5000))) == 5000
    chunks = b"".join(b"1\r\na\r\n" for _ in range(50_000)) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(large), large)
    assert asked(exchange(CHUNKED + chunks + NEXT)) == [["POST", "/a", "a" * 250_000], ["GET", "/next", ""]]


@pytest.mark.parametrize("step", [1000, 1_000_000])
@pytest.mark.parametrize(
    "sent",
    [
        b"3;a=" + b"b" * 70_000 + b"\r\nabc\r\n0\r\n\r\n",
        b"3;a=" + b"b" * 1000 + (b"\r\nabc\r\n3;a=" + b"b" * 1000) * 70 + b"\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabc\r\n0\r\n" + b"X: y\r\n" * 12_000 + b"\r\n",
        b"3\r\nabc\r\n0\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    ],
)
def test_what_is_around_chunks_is_bounded(sent: bytes, step: int) -> None:
    raw = CHUNKED + sent + SMUGGLED
    wire = exchange(*(raw[i : i + step] for i in range(0, len(raw), step)))

    assert [status for status, _ in wire.answers()] == [431]
    assert wire.ended


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
