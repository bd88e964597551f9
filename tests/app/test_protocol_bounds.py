"""The head of every request is bounded, so is what chunks bring along, and how long a connection may be idle."""

from typing import Any

import pytest

from app.protocol import MAX_HEAD_BYTES
from tests.app.wire import BODIES, CHUNKED, NEXT, OFFERS, POST, SMUGGLED, Wire, asked, connected, exchange, settled

BEFORE = {
    "nothing": (b"", 0),
    "a head": (NEXT, 1),
    "a body": (POST + b"Content-Length: 3\r\n\r\nabc", 1),
    "chunks": (CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", 1),
    "an offer": (POST + OFFERS["TLS"] + b"Content-Length: 3\r\n\r\nabc", 1),
    "all of them": (NEXT + POST + OFFERS["several"] + BODIES["chunked"][0] + POST + BODIES["length"][0] + NEXT, 4),
}
LARGE = {
    "a target": (b"GET /", b" HTTP/1.1\r\nHost: x"),
    "a value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: ", b""),
    "spaces": (b"GET /a HTTP/1.1\r\nHost: x\r\nX:" + b" " * 60_000, b""),
    "a name, and an offer": (POST + OFFERS["TLS"] + b"X-", b": y"),
    "many headers": (b"GET /a HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 10_000 + b"X: ", b""),
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("large", LARGE)
def test_every_head_of_a_connection_is_bounded(large: str, before: str) -> None:
    (first, last), (earlier, answered) = LARGE[large], BEFORE[before]
    refusal = 414 if large == "a target" else 431
    for size, expected in ((MAX_HEAD_BYTES, 200), (MAX_HEAD_BYTES + 1, refusal)):
        raw = earlier + first + b"a" * (size - len(first) - len(last)) + last + b"\r\n\r\n"
        for step in (len(raw), 4096, 16):
            wire = exchange(*(raw[i : i + step] for i in range(0, len(raw), step)))

            assert [status for status, _ in wire.answers()] == [200] * answered + [expected]
            assert wire.ended == (expected == refusal)


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


def ended_after(seconds: float, connection: Any, wire: Wire) -> bool:
    """Whether the connection is closed after so long, in which it is looked at every half second."""
    for _ in range(round(seconds * 2)):
        connection.watch(0.5)
    return wire.ended


async def test_an_idle_connection_is_closed_after_the_keep_alive_and_not_before() -> None:
    connection, state, wire = connected(client_seconds=1, keep_alive_seconds=75)
    connection.data_received(NEXT)
    await settled(state, wire)
    assert not ended_after(75, connection, wire)  # 75 s, and not the second that a client has for a head

    connection.data_received(NEXT)
    await settled(state, wire)
    assert not ended_after(75, connection, wire)  # each request begins the time anew

    assert ended_after(0.5, connection, wire)
    assert [status for status, _ in wire.answers()] == [200, 200]


async def test_a_connection_on_which_a_request_has_begun_is_not_idle() -> None:
    connection, state, wire = connected(client_seconds=10, keep_alive_seconds=1)
    connection.data_received(NEXT)
    await settled(state, wire)
    connection.data_received(NEXT[:8])
    assert not ended_after(10, connection, wire)

    connection.data_received(NEXT[8:])
    await settled(state, wire)
    assert [status for status, _ in wire.answers()] == [200, 200]
    assert ended_after(1.5, connection, wire)
