"""HTTP/1.1 on a connection: uvicorn's protocol, with a bound on request heads, without `Upgrade: h2c`."""

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65_536  # nothing else bounds it, and parsing 80 MB of it stopped the event loop for 4.5 s
_HEAD_END = b"\r\n\r\n"
_H2C = re.compile(rb"^upgrade(?=:[ \t]*h2c)", re.IGNORECASE | re.MULTILINE)
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    b"Content-Length: 50\r\n\r\nthe request's head is larger than 64 KiB, the most"
)


class BoundedProtocol(HttpToolsProtocol):
    """Refuses a head of more than 64 KiB with 431 and closes.

    A client may offer HTTP/2 by an `Upgrade: h2c` header, as Java's does by default, and a server may ignore it (RFC
    9110, 7.8). The parser instead stops at it and drops the body; so it never sees that header.
    """

    # Mutable state: whether a request's head is still coming, and how much of it came.
    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Take in what came over the connection."""
        if self._in_head:
            end = data.find(_HEAD_END)
            self._head_bytes += len(data) if end < 0 else end
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.write(_TOO_LARGE)
                self.transport.close()
                return
            head = data if end < 0 else data[:end]
            if _H2C.search(head):
                data = _H2C.sub(b"x-upgrade", head) + data[len(head) :]
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is complete."""
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()
