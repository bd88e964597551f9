"""HTTP/1.1 on a connection: uvicorn's protocol, strict about where a request ends, with bounded heads, no upgrades."""

from contextlib import suppress
from typing import cast

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app import problems
from app.problems import HeadTooLarge, MalformedRequest, UnsupportedRequest, UnsupportedVersion
from service.errors import ServiceError

log = structlog.get_logger(component="http")

MAX_HEAD_BYTES = 65_536  # nothing else bounds it, and parsing 80 MB of it stopped the event loop for 4.5 s
CHUNK_ALLOWANCE = 16  # bytes around a chunk that are taken for granted, as Go's net/http does
LINGER_SECONDS = 5.0  # closing on a client that still sends would destroy the response on its way
_END = b"\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """Answers the requests of one connection, or refuses one and closes (decision 15).

    - An offer to upgrade is ignored (RFC 9110, 7.8). The parser stops after such a head and takes the body for the next
      request, so the head is written again without `Upgrade` and given to a new parser.
    - The head of each request, and what chunks carry besides their data, is bounded. To count exactly, the parser gets
      pieces that hold no parts of two messages: they end where a message may.
    - What can be read in more than one way is refused, after the responses to earlier requests. What follows is never
      read.
    """

    # Mutable state. Of the current message: whether its head is still coming, the bytes of that so far (or of what is
    # around its chunks), what of its body is left by Content-Length, and whether it is chunked.
    _in_head = True
    _framing_bytes = 0
    _body_left = 0
    _chunked = False
    # Of the connection: the last bytes of a piece that did not end in _END, whether what comes is ignored, and a
    # refusal that waits for the responses before it.
    _tail = b""
    _ignoring = False
    _refusal: bytes | None = None

    def data_received(self, data: bytes) -> None:
        """Parse what came over the connection."""
        if self._ignoring:
            return
        self._unset_keepalive_if_required()
        try:
            if len(data) <= self._body_left:
                self.parser.feed_data(data)
            else:
                self._parse_pieces(data)
        except ServiceError as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            self._refuse(self._reason(error))

    def _parse_pieces(self, data: bytes) -> None:
        """Parse `data`, cut wherever a message may end, and count what is no body."""
        start, view = 0, memoryview(data)
        while start < len(data) and not self._ignoring:
            end = self._piece_end(data, start)
            if not self._body_left:
                self._framing_bytes += end - start
                if self._in_head and self._framing_bytes > MAX_HEAD_BYTES + len(_END):
                    raise HeadTooLarge(f"the request's head is larger than {MAX_HEAD_BYTES} bytes, the most")
            with suppress(httptools.HttpParserUpgrade):
                self.parser.feed_data(view[start:end])
            if self.parser.should_upgrade():
                self._parse_without_upgrade()
            self._check_chunks()
            start = end

    def _piece_end(self, data: bytes, start: int) -> int:
        """Heads end in an empty line, and so do chunked bodies; other bodies have a length."""
        if self._body_left:
            return min(len(data), start + self._body_left)
        if self._tail and (across := (self._tail + data[start : start + 3]).find(_END)) >= 0:
            end = start + across - len(self._tail) + len(_END)
        elif (found := data.find(_END, start)) >= 0:
            end = found + len(_END)
        else:
            self._tail = (self._tail + data[max(start, len(data) - 3) :])[-3:]
            return len(data)
        self._tail = b""
        return end

    def _check_chunks(self) -> None:
        if self._chunked and self._framing_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge(f"chunk extensions and trailers are larger than {MAX_HEAD_BYTES} bytes, the most")

    def _parse_without_upgrade(self) -> None:
        """Parse the last head again, without `Upgrade`: its body follows."""
        if self.parser.get_method() == b"CONNECT":
            raise UnsupportedRequest("this is no proxy: CONNECT is not done here; ask for a path")
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += name, b": ", value, b"\r\n"
        # A new one: this one reads no further where the connection is to be closed.
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"".join((*head, b"\r\n")))

    def on_headers_complete(self) -> None:
        """A head is complete."""
        if self.parser.should_upgrade():
            return  # it will be parsed once more
        if (version := self.parser.get_http_version()) not in ("1.0", "1.1"):
            raise UnsupportedVersion(f"HTTP/{version} is not spoken here; send HTTP/1.1")
        length, codings, hosts = 0, [], 0
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                codings.append(value.strip().lower())
            elif name == b"host":
                hosts += 1
        if codings and codings != [b"chunked"]:
            raise UnsupportedRequest("of transfer codings, only `Transfer-Encoding: chunked` is known here")
        if hosts > 1:
            raise MalformedRequest("more than one `Host`")
        if version == "1.0":
            self.expect_100_continue = False  # it knows no such response (RFC 9110, 10.1.1)
        super().on_headers_complete()
        self.headers = []  # trailers of a chunked body are no part of the head (RFC 9110, 6.5.1)
        self._in_head, self._framing_bytes, self._body_left, self._chunked = False, 0, length, bool(codings)

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        if self._body_left:
            self._body_left -= len(body)
        else:
            self._framing_bytes = max(0, self._framing_bytes - 3 * len(body) - CHUNK_ALLOWANCE)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete; the next byte begins another one."""
        if self.parser.should_upgrade():
            return
        if self._chunked:
            self._check_chunks()
            # This one takes `Connection: close` in a trailer for the request's and drops what comes next.
            self.parser = httptools.HttpRequestParser(self)
        self._in_head, self._chunked, self._framing_bytes = True, False, 0
        self._ignoring = not self.cycle.keep_alive
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A response is written."""
        last = not self.pipeline
        super().on_response_complete()
        if last and not self.transport.is_closing():
            if self._refusal is not None:
                self._send_refusal()
            elif self.expect_100_continue and not self._in_head:
                self._hang_up()  # a client that was not told to go on sends either the body or the next request

    def _reason(self, error: httptools.HttpParserError) -> ServiceError:
        """What the parser's `error` means for the client."""
        cause = error.__context__
        if isinstance(cause, ServiceError):
            return cause
        if self._in_head and self.parser.get_method() == b"PRI":
            return UnsupportedVersion("HTTP/2 is not spoken here; send HTTP/1.1, without prior knowledge of HTTP/2")
        if isinstance(error, httptools.HttpParserCallbackError):
            error = (
                cause if isinstance(cause, httptools.HttpParserError) else httptools.HttpParserError("invalid target")
            )
        return MalformedRequest(f"what was sent is no valid HTTP/1.1 request: {error}")

    def _refuse(self, error: ServiceError) -> None:
        """Respond with `error` after the responses to earlier requests, and read no more."""
        self._ignoring = True
        problem = problems.problem(error)
        log.warning("request_refused", status=problem.status, detail=problem.detail)
        body = problem.model_dump_json(exclude_none=True).encode()
        self._refusal = b"".join((
            STATUS_LINE[problem.status],
            b"Content-Type: %b\r\nContent-Length: %d\r\n" % (problems.MEDIA_TYPE.encode(), len(body)),
            b"Connection: close\r\n\r\n",
            body,
        ))  # fmt: skip
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if self._in_head or cycle is None:
            if cycle is None or cycle.response_complete:
                self._send_refusal()
        elif self.pipeline:
            self.pipeline.popleft()  # the youngest, whose body it is
        else:
            cycle.disconnected, cycle.waiting_for_100_continue = True, False
            cycle.message_event.set()
            if cycle.response_started:
                self._refusal = None  # the request has its response, or the beginning of one
            self._send_refusal()

    def _send_refusal(self) -> None:
        if self._refusal is not None:
            self.transport.write(self._refusal)
            self._refusal = None
        self._hang_up()

    def _hang_up(self) -> None:
        """Close after what was written, once the client has closed too or had its time to read it."""
        self._ignoring = True
        self._unset_keepalive_if_required()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.timeout_keep_alive_task = self.loop.call_later(LINGER_SECONDS, self.timeout_keep_alive_handler)
