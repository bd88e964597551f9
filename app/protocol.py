"""HTTP/1.1 on a connection: uvicorn's protocol, strict about where a request ends, with bounded heads, no upgrades."""

import asyncio
import fcntl
import socket
import struct
import termios
from contextlib import suppress
from functools import partial
from typing import Any, cast

import httptools
import structlog
from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app import problems, refusals
from app.connections import Connections
from app.metrics import HttpMetrics
from app.middleware import request_id
from app.problems import (
    ExpectationFailed,
    HeadTooLarge,
    MalformedRequest,
    RequestTimeout,
    TargetTooLong,
    UnsupportedRequest,
    UnsupportedVersion,
)
from service.errors import ServiceError

log = structlog.get_logger(component="http")

MAX_HEAD_BYTES = 65_536  # nothing else bounds it, and parsing 80 MB of it stopped the event loop for 4.5 s
CHUNK_ALLOWANCE = 16  # bytes around a chunk that are taken for granted, as Go's net/http does
LINGER_SECONDS = 5.0  # closing on a client that still sends would destroy the response on its way
MIN_BODY_RATE = 1000  # bytes/s; the slowest mobile networks carry more, and Apache demands 500
_END = b"\r\n\r\n"
_FRAMING = frozenset({b"content-length", b"transfer-encoding", b"host", b"expect"})  # what `_framing` reads
_VERSION = b"HTTP/1.1 "  # how every response begins
_SHOWN = 200  # bytes of a message that tell what it is
_GONE_SECONDS = 0.1  # after that a client near by that has closed has said so
_TCP_CLOSE = 7  # `tcpi_state` of a connection that was reset (linux/tcp.h)
_ACKED_OFFSET = 120  # of `tcpi_bytes_acked`, 8 bytes


class BoundedProtocol(HttpToolsProtocol):
    """Answers the requests of one connection, or refuses one and closes (decision 15).

    - An offer to upgrade is ignored (RFC 9110, 7.8). The parser stops after such a head and takes the body for the next
      request, so the head is written again without `Upgrade` and given to a new parser.
    - The head of each request, and what chunks carry besides their data, is bounded. To count exactly, the parser gets
      pieces that hold no parts of two messages: they end where a message may.
    - What can be read in more than one way is refused, after the responses to earlier requests. What follows is never
      read.
    - A client that is too slow is refused or cut off (decision 58); one that closes its sending side gets its answers.
    """

    server_state: Connections

    url = b""  # the base class sets it when a message begins

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
    # Of its client: how long the service has been waiting for it to send, what it sent since the last sweep, how long
    # it has read nothing, what it had read then, and whether it will send no more.
    _waited = 0.0
    _received = 0
    _unread_seconds = 0.0
    _acked = -1
    _eof = False

    def data_received(self, data: bytes) -> None:
        """Parse what came over the connection."""
        if self._ignoring:
            return
        self._received += len(data)
        try:
            if len(data) <= self._body_left:
                self.parser.feed_data(data)
            else:
                self._parse_pieces(data)
        except ServiceError as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            self._refuse(refusals.reason(error, b""))

    def _parse_pieces(self, data: bytes) -> None:
        """Parse `data`, cut wherever a message may end, and count what is no body."""
        start, view = 0, memoryview(data)
        while start < len(data) and not self._ignoring:
            end = self._piece_end(data, start)
            if not self._body_left:
                self._framing_bytes += end - start
                if self._in_head and self._framing_bytes > MAX_HEAD_BYTES + len(_END):
                    self._refuse_head(view[start:end])
            try:
                self.parser.feed_data(view[start:end])
            except httptools.HttpParserUpgrade:
                pass
            except httptools.HttpParserError as error:
                raise self._reason(error, bytes(view[start:end][:_SHOWN])) from error
            if self.parser.should_upgrade():
                self._parse_without_upgrade()
            self._check_chunks()
            start = end

    def _refuse_head(self, piece: memoryview) -> None:
        """Raise what refuses a head that is too large with `piece`; but for its end that is parsed, for the target."""
        self.parser.feed_data(piece[: -len(_END)])
        if len(self.url) > MAX_HEAD_BYTES // 2:
            raise TargetTooLong(
                f"the target makes the head larger than {MAX_HEAD_BYTES} bytes; send images in the body"
            )
        raise HeadTooLarge(f"the request's head is larger than {MAX_HEAD_BYTES} bytes, the most")

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

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, without the spaces around its value."""
        name, value = name.lower(), value.strip()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """A head is complete."""
        if self.parser.should_upgrade():
            return  # it will be parsed once more
        if (version := self.parser.get_http_version()) not in ("1.0", "1.1"):
            raise UnsupportedVersion(f"HTTP/{version} is not spoken here; send HTTP/1.1")
        if not self.url.startswith(b"/"):
            self._take_target()
        length, chunked = self._framing(version)
        if version == "1.0":
            self.expect_100_continue = False  # it knows no such response (RFC 9110, 10.1.1)
        super().on_headers_complete()
        self.headers = []  # trailers of a chunked body are no part of the head (RFC 9110, 6.5.1)
        self._in_head, self._framing_bytes, self._body_left, self._chunked = False, 0, length, chunked
        self._waited = 0.0

    def _framing(self, version: str) -> tuple[int, bool]:
        """The length that the head announces, and whether the body is chunked; refuses what a head may not have."""
        length, codings, hosts = 0, [], 0
        for name, value in self.headers:
            if name not in _FRAMING:
                continue
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                codings.append(value.lower())
            elif name == b"host":
                hosts += 1
                refusals.check_host(value)
            elif name == b"expect" and not self.expect_100_continue and version == "1.1":
                raise ExpectationFailed("of expectations, only `Expect: 100-continue` is met here; leave it out")
        if codings and codings != [b"chunked"]:
            raise UnsupportedRequest("of transfer codings, only `Transfer-Encoding: chunked` is known here")
        if hosts > 1 or (not hosts and version == "1.1"):
            raise MalformedRequest("more than one `Host`" if hosts else "no `Host`, which HTTP/1.1 has; send one")
        return length, bool(codings)

    def _take_target(self) -> None:
        """Replace a target that is no path by one, and `Host` by the host that it names (RFC 9112, 3.2.2)."""
        self.url, host = refusals.origin_form(self.parser.get_method(), self.url)
        if host is not None:
            self.headers[:] = [(name, host if name == b"host" else value) for name, value in self.headers]

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
        self._in_head, self._chunked, self._framing_bytes, self._waited = True, False, 0, 0.0
        self._ignoring = not self.cycle.keep_alive
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A response is written. No timer: `watch` knows what waits in the socket, and pauses of the process."""
        self.server_state.total_requests += 1
        self._waited = 0.0
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._send_refusal()
        elif self.expect_100_continue and not self._in_head:
            self._hang_up()  # a client that was not told to go on sends either the body or the next request

    def _reason(self, error: httptools.HttpParserError, begins: bytes) -> ServiceError:
        """What the parser's `error` means for a client whose piece begins as `begins`."""
        if self._in_head and self.parser.get_method() == b"PRI":
            return UnsupportedVersion("HTTP/2 is not spoken here; send HTTP/1.1, without prior knowledge of HTTP/2")
        return refusals.reason(error, begins if self._in_head else b"")

    def _refuse(self, error: ServiceError) -> None:
        """Respond with `error` after the responses to earlier requests, and read no more."""
        self._ignoring = True
        scope = cast("Scope | None", self.scope) or {"state": {}, "headers": ()}
        problem = problems.problem(error, scope["state"].get("request_id") or request_id(scope))
        metrics = cast("HttpMetrics | None", self.app_state.get("http"))  # None where another application is served
        if metrics:
            metrics.rejected(problem.type.rpartition(":")[2])
        log.warning("request_refused", status=problem.status, detail=problem.detail, request_id=problem.request_id)
        has_body = not (self.url and self.parser.get_method() == b"HEAD")
        self._refusal = refusals.response(problem, scope["headers"], self.server_state.cors_origins, has_body=has_body)
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
        if self._refusal:
            self.transport.write(self._refusal)
        self._refusal = None
        self._hang_up()

    def _hang_up(self) -> None:
        """Close after what was written, once the client has closed too or had its time to read it."""
        self._ignoring = True
        self._unset_keepalive_if_required()
        if self._eof:
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.timeout_keep_alive_task = self.loop.call_later(LINGER_SECONDS, self.timeout_keep_alive_handler)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        start = partial(super()._start_asgi_task, cycle, app)
        self.server_state.begin(
            start, cast("Scope", cycle.scope), first=cycle.scope["path"] in self.server_state.probes
        )

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's own signature
        """The client sends nothing more; returns whether the connection stays open, to answer what came before."""
        self._eof = self._ignoring = True
        cut = not self._in_head
        if cut and self.pipeline:
            self.pipeline.popleft()  # its body will never be complete
        elif cut or not self._responding():
            return False
        elif not self.pipeline:
            self._begin_response(self.cycle)
        if self._refusal is None:
            self._refusal = b""  # nothing to write, only to close after the responses
        return True

    def _responding(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is not None and not cycle.response_complete

    def _begin_response(self, cycle: RequestResponseCycle) -> None:
        """Write what every response begins with: a client that has closed altogether resets the connection then."""
        if not cycle.response_started:
            self.transport.write(_VERSION)
            self.transport = cycle.transport = cast("asyncio.Transport", _Begun(self.transport))
            self.loop.call_later(_GONE_SECONDS, self._abort_if_reset)

    def _abort_if_reset(self) -> None:
        if not self.transport.is_closing() and self._tcp_info()[0] == _TCP_CLOSE:
            self.transport.abort()

    def watch(self, seconds: float) -> None:
        """`seconds` have passed: end what takes a client too long, and cut off one that does not read."""
        limit = self.server_state.client_seconds
        if self.transport.get_write_buffer_size():
            acked = self._tcp_info()[1]
            self._unread_seconds = 0.0 if acked != self._acked else self._unread_seconds + seconds
            self._acked = acked
            if self._unread_seconds > limit:
                log.warning("client_does_not_read", seconds=limit, client=self.client and self.client[0])
                self.evict()
            return
        self._unread_seconds, received, self._received = 0.0, self._received, 0
        if self._ignoring:
            if self._eof:
                self._abort_if_reset()
            return
        if self._in_head:
            if self._responding():
                return
            if not self._framing_bytes and self.cycle is not None:
                limit = self.timeout_keep_alive
        elif self.flow.read_paused or (self._responding() and self.cycle.waiting_for_100_continue):
            return
        else:
            self._waited = max(0.0, self._waited - received / MIN_BODY_RATE)
        self._waited += seconds
        if self._waited > limit and not self._bytes_wait():
            self._end_waiting(limit)

    def _end_waiting(self, limit: float) -> None:
        if not self._in_head:
            self._refuse(RequestTimeout(
                f"the request's body came at less than {MIN_BODY_RATE} bytes/s for {limit:g} s, which "
                "PVT_CLIENT_TIMEOUT_SECONDS allows; send the request again over a faster connection"
            ))  # fmt: skip
        elif self._framing_bytes:
            self._refuse(RequestTimeout(
                f"the request's head was not complete after {limit:g} s, which PVT_CLIENT_TIMEOUT_SECONDS allows; "
                "send it at once"
            ))  # fmt: skip
        else:
            self.transport.close()

    def expendability(self) -> tuple[int, float] | None:
        """See `Connection`: silent newcomers first, then idle ones, slow bodies, and answers that nobody reads."""
        if self.transport.is_closing():
            return None
        if self.transport.get_write_buffer_size():
            return 3, -self._unread_seconds
        if self._in_head or self._ignoring:
            return None if self._responding() else (int(self.cycle is not None), -self._waited)
        return 2, -self._waited

    def evict(self) -> None:
        """Reset the connection: the kernel too keeps nothing of it."""
        with suppress(AttributeError, OSError):
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()

    def _bytes_wait(self) -> bool:
        """Whether the client has sent what was not read yet."""
        with suppress(AttributeError, OSError):
            file = self.transport.get_extra_info("socket").fileno()
            return fcntl.ioctl(file, termios.FIONREAD, b"\0" * 4) != b"\0" * 4
        return False

    def _tcp_info(self) -> tuple[int, int]:
        """The connection's state and the bytes that the client's side acknowledged; without those 0 and a progress."""
        with suppress(AttributeError, OSError, struct.error):
            info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
            return info[0], struct.unpack_from("Q", info, _ACKED_OFFSET)[0]
        return 0, -self.transport.get_write_buffer_size()


class _Begun:
    """A transport over which the first bytes of a response, always the same, have gone already."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = len(_VERSION)

    def write(self, data: bytes) -> None:
        """Write what follows."""
        self._transport.write(data[self._written :])
        self._written = 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever a transport has
        return getattr(self._transport, name)
