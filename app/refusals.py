"""What came over a connection and is no request that is read: what it may be, and the response that refuses it."""

import re
from collections.abc import Collection, Iterable

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from app.problems import MEDIA_TYPE, MalformedRequest, Problem, UnsupportedRequest, UnsupportedVersion
from service.errors import ServiceError

# Other protocols, by how they begin.
_PROTOCOLS = (
    (rb"\x16", "a TLS handshake, and this port speaks plain HTTP: write http:// in place of https://"),
    (
        rb"PROXY |\0\r\nQUIT\n",  # the second version's first four bytes are two empty lines, which are skipped
        "the PROXY protocol: turn it off in the load balancer, whose X-Forwarded-For is read (PVT_TRUSTED_PROXIES)",
    ),
    (rb"[\4\5][\1\2]", "a SOCKS handshake, and this is no proxy"),
)
_OTHERS = tuple((re.compile(pattern), what) for pattern, what in _PROTOCOLS)
_METHOD = re.compile(rb"(?:\r\n)*([!#$%&'*+.^_`|~0-9A-Za-z-]{1,30}) [^ ]+ HTTP/1\.[01]\r\n")
# Words of the parser's errors, and what helps.
_ADVICE = {
    "Expected HTTP/": "a request begins as `GET /path HTTP/1.1`, and a blank in the path is written %20",
    " url": "a target is a path such as /predict, and anything but ASCII in it is written %XX",
    "header": "a header is `Name: value`, without a blank before the colon",
    "CR": "each line ends with CR LF",
    "Transfer-Encoding": "send one of the two",
}
_ABSOLUTE = re.compile(rb"https?://(?P<host>[^/?#@]+)(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?", re.IGNORECASE)
_HOST = re.compile(rb"(?:[\w.~!$&'()*+;=%-]*|\[[0-9a-fA-F:.%\w-]+\])(?::[0-9]{0,5})?")  # RFC 3986, without commas
SERVER_WIDE = b"*"  # the target of an OPTIONS for the whole server (RFC 9112, 3.2.4)


def reason(error: httptools.HttpParserError, begins: bytes) -> ServiceError:
    """What the parser's `error` means for a client whose message begins as `begins`, as far as it has arrived."""
    cause = error.__context__
    if isinstance(cause, ServiceError):
        return cause
    for pattern, what in _OTHERS:
        if pattern.match(begins):
            return MalformedRequest(f"this is no HTTP/1.1 but {what}")
    if isinstance(error, httptools.HttpParserCallbackError):
        error = cause if isinstance(cause, httptools.HttpParserError) else httptools.HttpParserError("invalid target")
    text = str(error)
    if "HTTP version" in text:
        return UnsupportedVersion("this version of HTTP is not spoken here; send HTTP/1.1")
    if "method" in text and (line := _METHOD.match(begins)):
        name = line[1].decode()
        return UnsupportedRequest(f"no endpoint knows the method {name!r}; GET, POST and others are in capitals")
    advice = next((f"; {advice}" for words, advice in _ADVICE.items() if words in text), "")
    return MalformedRequest(f"what was sent is no valid HTTP/1.1 request: {text}{advice}")


def check_host(value: bytes) -> None:
    """Raises MalformedRequest unless `value` is that of a `Host` (RFC 9110, 7.2)."""
    if not _HOST.fullmatch(value):
        raise MalformedRequest(f"{value[:100].decode('latin-1')!r} is no `Host`, which is a name and perhaps a port")


def origin_form(method: bytes, target: bytes) -> tuple[bytes, bytes | None]:
    """The path and query of a target that is no path, and the host that it names, which is then the request's.

    An absolute one is what clients send to proxies, and servers must take (RFC 9112, 3.2.2).

    Raises:
        MalformedRequest: it is neither absolute nor, with OPTIONS, the whole server.
    """
    if target == SERVER_WIDE and method == b"OPTIONS":
        return target, None
    if not (found := _ABSOLUTE.fullmatch(target.partition(b"#")[0])):
        shown = target[:100].decode("latin-1")
        raise MalformedRequest(f"the target {shown!r} is neither a path, such as /predict, nor an http URL")
    return (found["path"] or b"/") + (found["query"] or b""), found["host"]


def response(
    problem: Problem, headers: Iterable[tuple[bytes, bytes]], origins: Collection[str], *, has_body: bool
) -> bytes:
    """The response that refuses, after which the connection is closed; without a body to HEAD.

    Pages of `origins`, see `Settings.cors_origins`, may read it. `headers` are those of the request that have arrived.
    """
    body = problem.model_dump_json(exclude_none=True).encode()
    return b"".join((
        STATUS_LINE[problem.status],
        b"Content-Type: %b\r\nContent-Length: %d\r\n" % (MEDIA_TYPE.encode(), len(body)),
        b"X-Request-ID: %b\r\n%b" % ((problem.request_id or "").encode(), _readers(headers, origins)),
        b"Connection: close\r\n\r\n",
        body if has_body else b"",
    ))  # fmt: skip


def _readers(headers: Iterable[tuple[bytes, bytes]], origins: Collection[str]) -> bytes:
    """The lines of a head that say which pages may read a response, as `CORSMiddleware` has them."""
    if not origins:
        return b""
    origin = next((value.decode("latin-1") for name, value in headers if name == b"origin"), "")
    allowed = "*" if "*" in origins else origin if origin in origins else ""
    lines = f"Access-Control-Allow-Origin: {allowed}\r\nAccess-Control-Expose-Headers: X-Request-ID\r\n"
    return (f"{lines if allowed else ''}Vary: Origin\r\n").encode()
