"""One connection to a protocol of uvicorn's, with everything that comes over it cut as a test says."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import httptools
import uvicorn

from app.connections import Connections
from app.protocol import BoundedProtocol

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

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    """Answers with what was asked; runs only where a request has a whole body."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    asked = [scope["method"], scope["path"], body.decode("latin-1")]
    await answer({"asked": asked, "headers": len(scope["headers"])}, send)


async def answer(content: Any, send: Send) -> None:
    data = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})


@dataclass
class Wire(asyncio.Transport):
    """What the protocol wrote, and whether it closed or said that it will write no more."""

    written: bytearray = field(default_factory=bytearray)
    ended: bool = False

    def write(self, data: Any) -> None:
        assert not self.ended
        self.written += data

    def write_eof(self) -> None:
        self.ended = True

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.ended = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ARG002  the signature is asyncio's
        return default

    def answers(self) -> list[tuple[int, Any]]:
        """Every answer's status and content, those that only say to continue left out."""
        return Answers(bytes(self.written).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")).read


class Answers:
    def __init__(self, written: bytes) -> None:
        self.read: list[tuple[int, Any]] = []
        self._body = b""
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(lenient_keep_alive=True)
        self._parser.feed_data(written)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.read.append((self._parser.get_status_code(), json.loads(self._body)))
        self._body = b""


def connected(
    protocol: type[Any] = BoundedProtocol, app: App = echo, *, client_seconds: float = 20, keep_alive_seconds: int = 5
) -> tuple[Any, Connections, Wire]:
    """A connection that has just been accepted, those of its process, and what it writes."""
    config = uvicorn.Config(app, http=protocol, ws="none", log_config=None, server_header=False, date_header=False,
                            timeout_keep_alive=keep_alive_seconds)  # fmt: skip
    config.load()
    state, wire = Connections(client_seconds=client_seconds, identify=lambda _: ""), Wire()
    connection = protocol(config=config, server_state=state, app_state={})
    connection.connection_made(wire)
    return connection, state, wire


def exchange(*pieces: bytes, protocol: type[Any] = BoundedProtocol, app: App = echo, in_turn: bool = False) -> Wire:
    """Send `pieces` on one connection, `in_turn` each after what those before it caused."""

    async def run() -> Wire:
        connection, state, wire = connected(protocol, app)
        for piece in pieces:
            if not wire.ended or protocol is BoundedProtocol:  # which still reads, and must ignore it
                connection.data_received(piece)
            if in_turn:
                await settled(state, wire)
        await settled(state, wire)
        connection.connection_lost(ConnectionResetError())
        await settled(state, wire)
        return wire

    return asyncio.run(run())


async def settled(state: Connections, wire: Wire) -> None:
    """Until nothing more happens: the requests that are left wait for more."""
    quiet, before = 0, (-1, -1)
    while quiet < 10:
        await asyncio.sleep(0)
        now = (state.total_requests, len(wire.written))
        quiet, before = quiet + 1 if now == before else 0, now


def asked(wire: Wire) -> list[list[str]]:
    """The requests that were answered by `echo`."""
    return [content["asked"] for status, content in wire.answers() if status == 200]
